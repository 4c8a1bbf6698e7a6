"""What `bncli explain` shows: a Markdown file per topic here, and a page per rule of the audit."""
