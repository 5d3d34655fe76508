"""Result cards of runs, and tables and pictures made of them."""
