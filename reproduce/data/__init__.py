"""From speech on disk to micro-batches: corpora, manifest, packed audio, vocabulary, batches."""
