// The product of two vectors of four signed bytes, packed into words: WGSL's own.
fn dot4(a: u32, b: u32) -> i32 { return dot4I8Packed(a, b); }
