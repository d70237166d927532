"""Building image-text data sets: samples in, webdataset shards with index, tokenizer and manifest out."""
