"""What is made of data once and kept in the cache: token stores, example stores, tokenizers."""
