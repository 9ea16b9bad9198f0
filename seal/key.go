package seal

import (
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"log/slog"
)

// KeySize is the length of a slot key and of the share that it wraps, in octets.
const KeySize = 32

const redacted = "[redacted]"

// A Key is 32 secret octets: the key of one slot, or the share that slots wrap. It cannot be printed, logged or encoded, and
// it cannot be compared with ==. The zero Key is no key: every use of it fails or panics.
type Key struct {
	_ [0]func()
	// fmt follows one pointer of an unexported field, but never two.
	p **[KeySize]byte
}

// NewKey copies octets, which must be 32 and not all zero.
func NewKey(octets []byte) (Key, error) {
	if len(octets) != KeySize {
		return Key{}, fmt.Errorf("making a slot key: want %d octets, got %d", KeySize, len(octets))
	}
	var zero [KeySize]byte
	if subtle.ConstantTimeCompare(octets, zero[:]) == 1 {
		return Key{}, errors.New("making a slot key: all octets are zero")
	}
	p := new([KeySize]byte)
	copy(p[:], octets)
	return Key{p: &p}, nil
}

// RandomKey returns 32 octets of the system's random generator.
func RandomKey() Key {
	p := new([KeySize]byte)
	rand.Read(p[:]) // never fails: see crypto/rand
	return Key{p: &p}
}

// IsZero reports whether k is the zero Key, which is no key.
func (k Key) IsZero() bool { return k.p == nil }

// Octets returns the 32 octets themselves, not a copy: Wipe clears them. It panics on the zero Key.
func (k Key) Octets() []byte { return (*k.p)[:] }

// Equal compares in constant time. The zero Key equals nothing, not even itself.
func (k Key) Equal(other Key) bool {
	if k.IsZero() || other.IsZero() {
		return false
	}
	return subtle.ConstantTimeCompare(k.Octets(), other.Octets()) == 1
}

// Wipe clears the octets, in all copies of k. The copies that the collector or a library made stay until the process ends.
func (k Key) Wipe() {
	if !k.IsZero() {
		clear(k.Octets())
	}
}

// Format writes a placeholder for every verb.
func (Key) Format(f fmt.State, _ rune) { io.WriteString(f, redacted) }

// LogValue returns a placeholder.
func (Key) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText fails: no encoder may write a key.
func (Key) MarshalText() ([]byte, error) { return nil, errors.New("a slot key is never encoded") }
