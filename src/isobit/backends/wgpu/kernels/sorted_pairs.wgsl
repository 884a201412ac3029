// Which products a dispatch of a matmul kernel makes. The file that uses it declares `routing`.
//
// A product is a pair of a token and an expert: activation row pair / top_k times a matrix of a stack,
// giving output row `pair`. Without a routing there is one matrix and the pairs are the tokens. With
// one, routing[groups_at] holds (matrix, first, count) for each group of pairs that share a read of
// the weights, and routing[first …] the pairs.

const CHUNK = 8u;  // pairs of one group

struct PairGroup { matrix: u32, first: u32, count: u32 }

fn group_of(group: u32) -> PairGroup {
  if (p.planned == 0u) {
    let first = CHUNK * group;
    return PairGroup(0u, first, min(CHUNK, p.n_pairs - first));
  }
  let at = p.groups_at + 3u * group;
  return PairGroup(routing[at], routing[at + 1u], routing[at + 2u]);
}

fn pair_at(i: u32) -> u32 {
  if (p.planned == 0u) { return i; }
  return routing[i];
}
