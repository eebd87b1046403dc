"""A miniature of ACE-Step 1.5's package: only its training part, rewritten small. It makes no music."""
