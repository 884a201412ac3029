// GeGLU (docs/numerics.md, section 5). Needs scalar and gate.

fn gated(gate: real, up: real) -> real {
  let cube = mul(mul(gate, gate), gate);
  let z = mul(add(gate, mul(cube, 0x3d372713u)), 0x3fcc422au);
  return mul(div(gate, add_normal(ONE, exp_real(negate(z)))), up);
}
