#!/usr/bin/env bash
# fuzz.sh TIME: runs each fuzz target of the module for TIME.
set -euo pipefail
packages=$(go list ./...)
for package in $packages; do
	targets=$(go test -list '^Fuzz' "$package" | grep '^Fuzz' || true)
	for target in $targets; do
		echo "fuzz $package $target $1"
		go test -run '^$' -fuzz "^$target\$" -fuzztime "$1" "$package" | tail -n 1
	done
done
