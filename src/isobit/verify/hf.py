"""Recording a Hugging Face model."""
