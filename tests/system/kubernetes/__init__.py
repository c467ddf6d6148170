"""What the rendered manifests of one overlay say together: rules over all objects, and errors planted to try them."""
