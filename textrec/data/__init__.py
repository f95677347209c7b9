"""From publishers' files to histories: sources, filters, splits, catalogues, batches. Knows no model."""
