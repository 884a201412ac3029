"""lm-evaluation-harness through /v1/completions, without torch: its numbers are the library's own.

The tasks are made of Python's standard library, so that no data set is fetched: which of four lines
comes next, the perplexity of a file, and a line to write.
"""

from __future__ import annotations

CONTEXT = 1024
SOURCES = ("textwrap", "bisect", "heapq", "fnmatch", "string")
_TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
target_delimiter: ""
"""
_CHOICE = """
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list:
  - metric: acc
"""
_ROLLING = """
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
"""
_WRITE = """
doc_to_text: "{{context}}"
doc_to_target: "{{line}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 24
metric_list:
  - metric: exact_match
"""
