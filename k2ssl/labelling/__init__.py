"""Frame labels by clustering: features, k-means, quality; is handed feature functions and knows no model."""
