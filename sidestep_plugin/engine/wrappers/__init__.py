"""The wrappers that replace names of upstream's while plugins are attached: one file per seam."""
