package derive

import (
	"bytes"
	"crypto/rand"
	"crypto/subtle"
	"fmt"
	"io"
	"log/slog"
)

// redacted is all that is ever printed of a key.
const redacted = "(secret)"

// secret holds octets that cannot be printed. They are captured by a closure, because fmt ignores the methods of a value
// that lies in an unexported field and prints what reflection reaches: of a function, that is the address of its code.
// The function makes the type incomparable too. Copies share the octets.
type secret struct {
	access func(wipe bool) []byte
}

// newSecret takes ownership of octets.
func newSecret(octets []byte) secret {
	return secret{func(wipe bool) []byte {
		if wipe {
			clear(octets)
			octets = nil
		}
		return octets
	}}
}

// octets returns the octets themselves, or ErrNoKey.
func (s secret) octets() ([]byte, error) {
	if s.access != nil {
		if b := s.access(false); len(b) > 0 {
			return b, nil
		}
	}
	return nil, ErrNoKey
}

func (s secret) equal(other secret) bool {
	a, err := s.octets()
	if err != nil {
		return false
	}
	b, err := other.octets()
	return err == nil && subtle.ConstantTimeCompare(a, b) == 1
}

func (s secret) wipe() {
	if s.access != nil {
		s.access(true)
	}
}

// Format prints the same few characters for every key and every verb.
func (s secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// LogValue is what slog logs of a key.
func (s secret) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText fails with ErrSecret.
func (s secret) MarshalText() ([]byte, error) { return nil, ErrSecret }

// MarshalJSON fails with ErrSecret.
func (s secret) MarshalJSON() ([]byte, error) { return nil, ErrSecret }

// Master is the one secret of a generation of a realm, 32 octets. The zero value is no master. It cannot be printed or
// encoded. Copies share the octets. It is safe for concurrent use, but for Wipe.
type Master struct{ secret }

// NewMaster copies a master from octets, which must be 32 and not all the same; the caller wipes its own. Its errors do
// not show the octets.
func NewMaster(octets []byte) (Master, error) {
	if len(octets) != MasterSize {
		return Master{}, fmt.Errorf("a master is %d octets, this has %d: give the raw octets, not hex or base64",
			MasterSize, len(octets))
	}
	if bytes.Count(octets, octets[:1]) == len(octets) {
		return Master{}, fmt.Errorf("a master of %d equal octets is not a secret: make one with a random generator",
			MasterSize)
	}
	return Master{newSecret(bytes.Clone(octets))}, nil
}

// RandomMaster makes a new master from the system's random generator.
func RandomMaster() Master {
	octets := make([]byte, MasterSize)
	_, _ = rand.Read(octets) // never fails: it ends the program instead
	return Master{newSecret(octets)}
}

// Octets returns the master's own octets, not a copy: they are zero after Wipe. It fails with ErrNoKey if there are none.
func (m Master) Octets() ([]byte, error) { return m.octets() }

// Equal compares in constant time. No master equals the zero value, the zero value included.
func (m Master) Equal(other Master) bool { return m.equal(other.secret) }

// Wipe overwrites the octets, for all copies of this value. It must not run beside other uses.
func (m Master) Wipe() { m.wipe() }

// ServiceKey is the key of a service or container, 32 or 64 octets. The zero value is no key. It cannot be printed or
// encoded. Copies share the octets. It is safe for concurrent use, but for Wipe.
type ServiceKey struct{ secret }

// Octets returns the key's own octets, not a copy: they are zero after Wipe. It fails with ErrNoKey if there are none.
func (k ServiceKey) Octets() ([]byte, error) { return k.octets() }

// Equal compares in constant time. No key equals the zero value, the zero value included.
func (k ServiceKey) Equal(other ServiceKey) bool { return k.equal(other.secret) }

// Wipe overwrites the octets, for all copies of this value. It must not run beside other uses.
func (k ServiceKey) Wipe() { k.wipe() }

// VMKey is a key of a virtual machine, 32 or 64 octets. The zero value is no key. It cannot be printed or encoded. Copies
// share the octets. It is safe for concurrent use, but for Wipe.
type VMKey struct{ secret }

// Octets returns the key's own octets, not a copy: they are zero after Wipe. It fails with ErrNoKey if there are none.
func (k VMKey) Octets() ([]byte, error) { return k.octets() }

// Equal compares in constant time. No key equals the zero value, the zero value included.
func (k VMKey) Equal(other VMKey) bool { return k.equal(other.secret) }

// Wipe overwrites the octets, for all copies of this value. It must not run beside other uses.
func (k VMKey) Wipe() { k.wipe() }
