//go:build race

package snp_test

// stride under the race detector, where a signature takes ten times as long: another bit of each octet.
const stride = 9
