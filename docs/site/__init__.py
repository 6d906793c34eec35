"""The documentation site: pages, API reference, commands, gallery, and checks of what is built."""
