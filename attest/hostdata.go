package attest

import (
	"crypto/sha256"

	"keybroker/internal/tuple"
)

// HostData returns the HOST_DATA that a guest of this subject is launched with, 32 octets: it tells guests of one image apart.
// DO NOT CHANGE: launched guests have it.
func HostData(subject string) []byte {
	sum := sha256.Sum256(tuple.Encode([]byte("keybroker/v1 host data"), []byte(subject)))
	return sum[:]
}
