"""The machine: weights as the extension takes them, and which SIMD levels run here."""
