"""The wrappers that replace names of upstream's while plugins are attached: one file for each thing of upstream's."""
