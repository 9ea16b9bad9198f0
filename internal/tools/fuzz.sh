#!/usr/bin/env bash
# fuzz.sh TIME [PACKAGE...]: runs each fuzz target of the packages, or of the whole module, for TIME. What a target finds is
# printed, and kept as a seed below its package's testdata/fuzz.
set -euo pipefail
time=$1
shift
packages=$(go list "${@:-./...}")
for package in $packages; do
	targets=$(go test -list '^Fuzz' "$package")
	for target in $(grep '^Fuzz' <<<"$targets" || true); do
		# Without -fuzzminimizetime go may spend all of a short TIME on making one interesting input smaller.
		if ! output=$(go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 1x "$package" 2>&1); then
			# At the very end of TIME go may report its own deadline as a failure. A finding comes with the input that it keeps.
			if ! grep -q 'context deadline exceeded' <<<"$output" || grep -q 'Failing input written' <<<"$output"; then
				printf '%s\nfuzz: error: %s of %s failed\n' "$output" "$target" "$package" >&2
				exit 1
			fi
		fi
		printf 'fuzz  %-34s %-36s %s\n' "$package" "$target" "$(grep -oE 'execs: [0-9]+' <<<"$output" | tail -n 1)"
	done
done
