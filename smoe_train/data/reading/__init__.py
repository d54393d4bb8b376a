"""Reading files: downloads, archives, rows and documents, and from them the splits of labelled sets."""
