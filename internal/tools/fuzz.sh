#!/usr/bin/env bash
# fuzz.sh TIME [PACKAGE...]: runs each fuzz target of the packages, or of the whole module, for TIME, as many at once as there
# are CPUs. What a target finds is printed, and kept as a seed below its package's testdata/fuzz.
set -euo pipefail
export time=$1
shift

targets() { # a line "PACKAGE TARGET" for each
	local format='{{$p := .}}{{range .TestGoFiles}}{{$p.ImportPath}} {{$p.Dir}}/{{.}}{{"\n"}}{{end}}'
	format+=${format//TestGoFiles/XTestGoFiles}
	go list -f "$format" "${@:-./...}" | while read -r package file; do
		sed -n "s|^func \\(Fuzz[A-Za-z0-9_]*\\)(.*|$package \\1|p" "$file"
	done
}

fuzz() {
	local package=$1 target=$2 output
	# Without -fuzzminimizetime go may spend all of a short TIME on making one interesting input smaller.
	if ! output=$(go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 1x -parallel 1 "$package" 2>&1); then
		# At the very end of TIME go may report its own deadline as a failure. A finding comes with the input that it keeps.
		if ! grep -q 'context deadline exceeded' <<<"$output" || grep -q 'Failing input written' <<<"$output"; then
			printf '%s\nfuzz: error: %s of %s failed\n' "$output" "$target" "$package" >&2
			exit 255 # xargs then starts no other
		fi
	fi
	printf 'fuzz  %-34s %-36s %s\n' "$package" "$target" "$(grep -oE 'execs: [0-9]+' <<<"$output" | tail -n 1)"
}
export -f fuzz

targets "$@" | xargs -P "$(nproc)" -n 2 bash -c 'set -eo pipefail; fuzz "$@"' fuzz
