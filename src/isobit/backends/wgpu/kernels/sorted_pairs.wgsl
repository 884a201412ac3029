// Which products a dispatch of a matmul kernel makes. The file that uses it declares `plan`.
//
// A product is an item: activation row item / divide times a matrix of a stack, giving output row
// `item`. Without a plan there is one matrix and the items are the tokens. With one, plan[entries]
// holds (matrix, first, count) for each group of items that share a read of the weights, and
// plan[first …] the items.

const CHUNK = 8u;  // items of one group

struct Items { matrix: u32, first: u32, count: u32 }

fn items_of(group: u32) -> Items {
  if (p.planned == 0u) {
    let first = CHUNK * group;
    return Items(0u, first, min(CHUNK, p.items - first));
  }
  let at = p.entries + 3u * group;
  return Items(plan[at], plan[at + 1u], plan[at + 2u]);
}

fn item_at(i: u32) -> u32 {
  if (p.planned == 0u) { return i; }
  return plan[i];
}
