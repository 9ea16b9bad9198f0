// Package tuple is the one encoding of octets that keybroker hashes, signs, authenticates or gives to a key derivation
// function: each field preceded by its length, so that no two lists of fields encode alike.
package tuple

import (
	"encoding/binary"
	"fmt"
	"math"
)

// Encode returns E(x1..xn): each field as 4 octets of big-endian length and then its octets. Encodings concatenate:
// Encode(a, b) equals Encode(a) followed by Encode(b). It panics if a field is longer than 4 GiB - 1, which no caller can
// produce from input that it has bounded.
func Encode(fields ...[]byte) []byte {
	size := 0
	for _, f := range fields {
		size += 4 + len(f)
	}
	out := make([]byte, 0, size)
	for _, f := range fields {
		if uint64(len(f)) > math.MaxUint32 {
			panic(fmt.Sprintf("tuple: a field of %d octets", len(f)))
		}
		out = binary.BigEndian.AppendUint32(out, uint32(len(f)))
		out = append(out, f...)
	}
	return out
}

// Uint32 returns u32(n): 4 octets, big-endian.
func Uint32(n uint32) []byte {
	return binary.BigEndian.AppendUint32(nil, n)
}
