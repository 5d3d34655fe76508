"""Networks: frontends, encoders, and the models trained with them."""
