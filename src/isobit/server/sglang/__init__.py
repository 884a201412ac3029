"""SGLang's interface: generate."""
