"""The two files of a miniature model; `write_model()` copies them beside its weights."""
