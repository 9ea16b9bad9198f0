//go:build !race

package snp_test

// stride is how many bits lie between those that are flipped: every bit.
const stride = 1
