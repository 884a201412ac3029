// How the KV cache lies in its buffers (docs/numerics.md, section 6; memory.py).
//
// A page of 64 positions holds for each head: K as two planes [plane][word][position], a word being
// four values of a position; V as two planes [plane][position / 4][value], a word being four
// positions of a value; the scales of K, of V. `words` is ceil(head_dim / 4), the rest zeros.

const KV_PAGE = 64u;

// The first position that a query sees through a window of so many, its own among them; 0: no window.
fn first_seen(position: u32, window: u32) -> u32 {
  return select(0u, position + 1u - window, window != 0u && position >= window);
}

fn head_page(page: u32, heads: u32, head: u32, words: u32) -> u32 {
  return (page * heads + head) * (256u * words + 2u * KV_PAGE);
}
fn key_at(words: u32, plane: u32, word: u32) -> u32 { return (plane * words + word) * KV_PAGE; }
fn value_at(words: u32, plane: u32, four: u32) -> u32 {
  return 128u * words + (16u * plane + four) * 4u * words;
}
fn key_scales_at(words: u32) -> u32 { return 256u * words; }
fn value_scales_at(words: u32) -> u32 { return 256u * words + KV_PAGE; }
