// The clamped SwiGLU (docs/numerics.md, section 5). Needs scalar and gate.

// The smaller of two reals.
fn minimum(a: real, b: real) -> real { return select(b, a, order(a) <= order(b)); }

fn gated(gate: real, up: real) -> real {
  let low = minimum(gate, p.limit);
  let by = add_normal(ONE, exp_real(negate(mul(low, p.factor))));
  let through = maximum(minimum(up, p.limit), negate(p.limit));
  return mul(div(low, by), add(through, ONE));
}
