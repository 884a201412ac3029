"""An answer's text, read as it comes: thinking, text and tool calls, as events."""
