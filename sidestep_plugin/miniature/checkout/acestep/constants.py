"""The miniature's words for a prompt; ACE-Step has its own."""

DEFAULT_DIT_INSTRUCTION = "Make the piece that is described:"
PROMPT = "# Instruction\n{}\n\n# Caption\n{}\n\n# Metas\n{}<|endoftext|>\n"
