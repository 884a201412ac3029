// Router, and the routing of the experts' products (docs/numerics.md, section 7). Needs scalar, reduce
// and sorted_pairs. `routing` holds a token's expert ids, then at p.sorted_pairs the pairs, at
// p.groups_at the groups of pairs (sorted_pairs.wgsl), at p.counts room for sorting.

struct Params {
  experts: u32,
  k: u32,
  normalise: u32,
  softmax: u32,
  bias_at: u32,  // + 1; 0: none
  expert_groups: u32,
  groups_used: u32,
  pairs: u32,  // tokens * k
  sorted_pairs: u32,
  groups_at: u32,
  groups: u32,  // that the products' dispatches look at
  counts: u32,
  planned: u32,  // the last two are for sorted_pairs.wgsl
  n_pairs: u32,
}
@group(0) @binding(1) var<uniform> p: Params;
@group(0) @binding(2) var<storage, read> logits: array<u32>;  // or, without softmax, probabilities
@group(0) @binding(3) var<storage, read> vectors: array<u32>;
@group(0) @binding(4) var<storage, read_write> probabilities: array<u32>;  // and keys of each token
@group(0) @binding(5) var<storage, read_write> router_weights: array<u32>;
@group(0) @binding(6) var<storage, read_write> routing: array<u32>;

var<workgroup> chosen: array<u32, 64>;
var<workgroup> rivals: array<vec4<u32>, 64>;  // 256 keys
var<workgroup> group_keys: array<u32, 64>;

// An integer that compares as the score does, above 0, which is for what is not to be chosen.
fn key_of(score: real) -> u32 { return max(order(score), 1u); }

// Keys, from `at` on, of experts in all but the best groups become 0. With a softmax a group is as
// good as its best, else the second added.
fn leave_groups(lane: u32, at: u32) {
  let size = p.experts / p.expert_groups;
  storageBarrier();
  if (lane < p.expert_groups) {
    var best = 0u;
    var second = 0u;
    for (var i = 0u; i < bound(size); i++) {
      let key = probabilities[at + lane * size + i];
      second = max(second, min(best, key));
      best = max(best, key);
    }
    group_keys[lane] = best;
    if (p.softmax == 0u) { group_keys[lane] = key_of(add(from_order(best), from_order(second))); }
  }
  workgroupBarrier();
  for (var e = lane; e < p.experts; e += 256u) {
    let own = group_keys[e / size];
    var before = 0u;
    for (var i = 0u; i < bound(p.expert_groups); i++) {
      before += select(0u, 1u, group_keys[i] > own || (group_keys[i] == own && i < e / size));
    }
    if (before >= p.groups_used) { probabilities[at + e] = 0u; }
  }
}

fn write_group(i: u32, expert: u32, first: u32, count: u32) {
  routing[p.groups_at + 3u * i] = expert;
  routing[p.groups_at + 3u * i + 1u] = first;
  routing[p.groups_at + 3u * i + 2u] = count;
}

// The k experts of a token and their weights, and the routing in which every pair is a group.
@compute @workgroup_size(256)
fn top_k(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let row = group.x * p.experts;
  let base = 2u * row;
  let keys = base + p.experts;
  if (p.softmax != 0u) {
    var highest = 0u;
    for (var e = lane; e < p.experts; e += 256u) { highest = max(highest, order(logits[row + e])); }
    let m = from_order(largest(lane, highest, 256u));
    var sum = 0u;
    for (var e = lane; e < p.experts; e += 256u) {
      let weight = exp_real(sub_normal(logits[row + e], m));
      probabilities[base + e] = weight;
      sum = add_normal(sum, weight);  // exp gives no subnormal
    }
    let total = tree(lane, sum, 256u);
    for (var e = lane; e < p.experts; e += 256u) {
      probabilities[base + e] = div(probabilities[base + e], total);
    }
  } else {
    for (var e = lane; e < p.experts; e += 256u) { probabilities[base + e] = logits[row + e]; }
  }
  for (var e = lane; e < p.experts; e += 256u) {
    var bias = 0u;
    if (p.bias_at != 0u) { bias = vectors[p.bias_at - 1u + e]; }
    probabilities[keys + e] = key_of(add(probabilities[base + e], bias));
  }
  if (p.groups_used < p.expert_groups) { leave_groups(lane, keys); }
  // An expert's rank is the number of better ones.
  for (var e0 = 0u; e0 < bound(p.experts); e0 += 256u) {
    let e = e0 + lane;
    let mine = probabilities[keys + min(e, p.experts - 1u)];
    var rank = 0u;
    for (var f0 = 0u; f0 < bound(p.experts); f0 += 256u) {
      let f = f0 + lane;
      workgroupBarrier();
      rivals[lane / 4u][lane % 4u] = select(0u, probabilities[keys + min(f, p.experts - 1u)], f < p.experts);
      workgroupBarrier();
      let fours = select(0u, min(64u, (p.experts - f0 + 3u) / 4u), e < p.experts);
      for (var i = 0u; i < bound(fours); i++) {
        let others = rivals[i];
        let before = vec4(f0 + 4u * i) + vec4(0u, 1u, 2u, 3u) < vec4(e);
        let better = (others > vec4(mine)) | ((others == vec4(mine)) & before);
        let ones = select(vec4(0u), vec4(1u), better);
        rank += ones.x + ones.y + ones.z + ones.w;
      }
    }
    if (e < p.experts && mine != 0u && rank < p.k) {
      let pair = group.x * p.k + rank;
      chosen[rank] = probabilities[base + e];
      routing[pair] = e;
      routing[p.sorted_pairs + pair] = pair;
      write_group(pair, e, p.sorted_pairs + pair, 1u);
    }
  }
  workgroupBarrier();
  var all = 0u;  // what is flushed would be lost in a sum of 2^-14 or more
  for (var r = 0u; r < bound(p.k); r++) { all = add_normal(all, chosen[r]); }
  all = max(all, 0x38800000u);
  if (lane < p.k) {
    router_weights[group.x * p.k + lane] = select(chosen[lane], div(chosen[lane], all), p.normalise != 0u);
  }
}

// The routing in which an expert's pairs are together: one workgroup, an expert an invocation.
@compute @workgroup_size(256)
fn sort_pairs(@builtin(local_invocation_index) lane: u32) {
  for (var e0 = 0u; e0 < bound(p.experts); e0 += 256u) {
    var n = 0u;
    for (var i = 0u; i < bound(p.pairs); i++) { n += select(0u, 1u, routing[i] == e0 + lane); }
    if (e0 + lane < p.experts) { routing[p.counts + e0 + lane] = n; }
  }
  storageBarrier();
  var unused = 0u;
  for (var e0 = 0u; e0 < bound(p.experts); e0 += 256u) {
    let e = e0 + lane;
    var first = p.sorted_pairs;  // of the expert's pairs
    var at_group = 0u;  // of its groups
    unused = 0u;
    for (var f = 0u; f < bound(p.experts); f++) {
      let n = routing[p.counts + f];
      if (f < e) {
        first += n;
        at_group += (n + CHUNK - 1u) / CHUNK;
      }
      unused += (n + CHUNK - 1u) / CHUNK;
    }
    var at = first;
    for (var i = 0u; i < bound(p.pairs); i++) {
      if (e < p.experts && routing[i] == e) {
        routing[at] = i;
        at += 1u;
      }
    }
    for (var i = 0u; i < bound(p.pairs); i += CHUNK) {
      if (i < at - first) { write_group(at_group + i / CHUNK, e, first + i, min(CHUNK, at - first - i)); }
    }
  }
  for (var i = unused + lane; i < p.groups; i += 256u) { write_group(i, 0u, 0u, 0u); }
}
