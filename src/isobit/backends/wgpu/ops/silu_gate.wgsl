// SwiGLU (docs/numerics.md, section 5). Needs scalar and gate.

fn gated(gate: real, up: real) -> real {
  return mul(div(gate, add_normal(ONE, exp_real(negate(gate)))), up);
}
