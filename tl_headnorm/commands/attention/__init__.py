"""`attention`: where heads attend."""
