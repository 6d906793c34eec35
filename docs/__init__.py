"""Pages in Markdown, and the programs that make a site of them."""
