"""Tokenizers, one file each; all are found by searching this folder."""
