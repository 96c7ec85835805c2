"""What tests of the models need: pytest plugins."""
