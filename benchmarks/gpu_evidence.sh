#!/usr/bin/env bash
# What the GPU contract promises, measured on this machine's GPU: on a large model and on the sample.
#
# usage: benchmarks/gpu_evidence.sh MODEL.gguf OUT [--peer LLAMA_BENCH] [--commit HASH]
#
# The CPU stands in for the specification where the model is too large for NumPy. OUT gets a log of
# each step and, in OUT/evidence, what `isobit contract status --evidence` reads. A step that fails
# or takes too long does not stop the others; exit code 1 says that one did.
# PYTHON names the interpreter that has isobit (python3), LIMIT the seconds in all (200).
set -uo pipefail
cd "$(dirname "$0")/.."
model=$1 out=$2
shift 2
python=${PYTHON:-python3} limit=${LIMIT:-200}
contract=contracts/qwen3-moe-forward-gpu-v2.yaml
mkdir -p "$out"
summary=() failed=0

step() { # step NAME SECONDS OPTION ...: runs isobit, keeps the log, goes on whatever comes
  local name=$1 most=$2 begin=$SECONDS code=0
  local left=$((limit - SECONDS))
  shift 2
  if ((left < 1)); then
    summary+=("not run $name: the $limit seconds are over")
    failed=1
    return
  fi
  echo "+ $name: isobit $*"
  timeout -k 5 $((most < left ? most : left)) "$python" -m isobit "$@" >"$out/$name.log" 2>&1 ||
    code=$?
  tail -n 25 "$out/$name.log" | cut -c 1-300
  local verdict="passed " last
  last=$(grep -m 1 -E '^(identical|different|[0-9]+ passed)' "$out/$name.log" ||
    grep '^isobit: ' "$out/$name.log" | tail -n 1)
  # 6: some measures speak of another model or device; where all do, nothing was shown
  if [[ $code != [06] || $last == "0 passed"* ]]; then
    verdict="FAILED " failed=1
  fi
  summary+=("$verdict $name ($((SECONDS - begin)) s, exit code $code): $last")
}

check() { # check NAME SECONDS MODEL BACKEND [OPTION ...]
  local name=$1 most=$2 file=$3 backend=$4
  shift 4
  step "$name" "$most" contract check $contract --model "$file" --backends "$backend" \
    --evidence "$out/evidence" "$@"
}

large=785,9217,308,374,264,6716,750,220,17,220,488,220,17,30,1303,5693,198,262,470,856
small=605,290,948,268,624,475,1133,310,702,657,201,702,814,201

check cuda-large-check 100 "$model" cuda "$@"
check cuda-sample-check 60 sample cuda "$@"
for part in large sample; do
  file=$model tokens=$large
  [ $part = large ] || file=sample tokens=$small
  step cuda-$part-verify 60 verify "$file" --backend cuda --against cpu --tokens $tokens
  step cpu-$part-receipt 40 run "$file" --backend cpu --tokens $tokens -n 16 --temperature 0.7 \
    --seed 1 --json --receipt "$out/$part.receipt"
  step cuda-$part-replay 40 replay "$out/$part.receipt" "$file" --backend cuda
done
if "$python" -c 'import wgpu' 2>/dev/null; then
  check wgpu-sample-check 60 sample wgpu "$@"
  check wgpu-large-check 60 "$model" wgpu "$@"
else
  summary+=("not run wgpu: no such package here")
fi
"$python" -m isobit contract status $contract --evidence "$out/evidence" \
  -o "$out/status.md" --html "$out/status.html"

printf '\n'
printf '%s\n' "${summary[@]}" | tee "$out/summary.txt"
exit $failed
