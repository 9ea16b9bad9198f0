// Package derive is the key schedule: it turns a realm's master into the keys of services and virtual machines, into the
// realm's id and into its identity, as docs/protocol.md says octet by octet.
//
// Two holders compute it. A [Schedule] does so in the caller's own memory, for the one who just opened the realm. A
// [Holder] asks a child process, the keyholder, which maps the secret page that the opener filled and answers nothing but
// derivations of keys and signatures under two labels; a broker that uses one never has the master, what is extracted from
// it, or the identity's seed in its memory.
//
// What this does not stop: code that runs in the broker can ask for any key that it can name, and root can read the
// keyholder's heap, where HMAC's padded copies of what is in the page are left behind.
package derive

import (
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
	"fmt"
)

// MasterSize is the length of a master in octets.
const MasterSize = 32

// prkSize is the length of HKDF-Extract's output with SHA-256.
const prkSize = sha256.Size

// Errors of this package that callers match.
var (
	// ErrNoKey means a key that is the zero value or was wiped.
	ErrNoKey = errors.New("no key: it was never set or has been wiped")
	// ErrSecret means an attempt to write a key as text, by an encoder or a log.
	ErrSecret = errors.New("a key cannot be written as text")
	// ErrRefused means a derivation or a signature that a holder does not do for anybody.
	ErrRefused = errors.New("refused by the keyholder")
	// ErrGeneration means a generation that the realm does not have.
	ErrGeneration = errors.New("unknown generation")
)

// extract is PRK = HKDF-Extract-SHA256(no salt, master). See RFC 5869, section 2.2.
func extract(master []byte) ([]byte, error) {
	prk, err := hkdf.Extract(sha256.New, master, nil)
	if err != nil {
		return nil, fmt.Errorf("extracting from the master: %w", err)
	}
	return prk, nil
}

// expand is X(info, L) = HKDF-Expand(PRK, info, L). See RFC 5869, section 2.3.
func expand(prk, info []byte, length int) ([]byte, error) {
	out, err := hkdf.Expand(sha256.New, prk, string(info), length)
	if err != nil {
		return nil, fmt.Errorf("expanding: %w", err)
	}
	return out, nil
}
