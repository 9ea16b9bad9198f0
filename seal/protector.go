package seal

import (
	"context"
	"encoding/hex"
	"fmt"

	"github.com/go-json-experiment/json/jsontext"

	"keybroker/internal/octet"
)

// A RealmID names a realm: 16 octets that its first master gives.
type RealmID [16]byte

// String returns the id in hex, 32 characters.
func (r RealmID) String() string { return hex.EncodeToString(r[:]) }

// ParseRealmID reads 32 lower case hex characters.
func ParseRealmID(s string) (RealmID, error) {
	var r RealmID
	if !decodeHex(r[:], s) {
		return RealmID{}, fmt.Errorf("reading a realm id: want %d lower case hex characters, got %d characters", 2*len(r), len(s))
	}
	return r, nil
}

// A SlotID names a keyslot within its realm file: 8 random octets.
type SlotID [8]byte

// String returns the id in hex, 16 characters.
func (s SlotID) String() string { return hex.EncodeToString(s[:]) }

// ParseSlotID reads 16 lower case hex characters.
func ParseSlotID(s string) (SlotID, error) {
	var id SlotID
	if !decodeHex(id[:], s) {
		return SlotID{}, fmt.Errorf("reading a slot id: want %d lower case hex characters, as in `keybroker slot list`", 2*len(id))
	}
	return id, nil
}

// decodeHex fills out from lower case hex of exactly its length.
func decodeHex(out []byte, s string) bool {
	b, err := octet.ParseHex(s)
	if err != nil || len(b) != len(out) {
		return false
	}
	copy(out, b)
	return true
}

// A Binding is the one slot that a protector works for. A protector that derives its key (a challenge to a token, a password
// hash) mixes it in, so that the same token or passphrase gives another key in another slot.
type Binding struct {
	Realm RealmID
	Slot  SlotID
}

// A Protector makes and recovers the key of a slot of one kind. What a kind needs beyond this (a device's path, a prompt) its
// constructor takes. One call at a time.
type Protector interface {
	// Enroll makes a new slot key and the public parameters that Open will need: one JSON object, stored in the realm file.
	Enroll(ctx context.Context, b Binding) (params jsontext.Value, k Key, err error)
	// Open recovers the slot key. params are as Enroll returned them, but they come from a file: their bounds are checked
	// before they are used. A wrong secret need not be noticed: the share will not unwrap.
	Open(ctx context.Context, b Binding, params jsontext.Value) (Key, error)
}

// Interactor is a Protector that may need a human to open: it is tried after those that do not, and never by a start that nobody
// watches.
type Interactor interface {
	Interactive() bool
}

// Describer is a Protector that can say in a few words what a slot is bound to, from its public parameters alone.
type Describer interface {
	Describe(params jsontext.Value) (string, error)
}

// Mismatcher is a Protector whose Open cannot tell a wrong secret (a passphrase, another token) from the right one: Mismatch is
// then the reason that is given when the share does not unwrap.
type Mismatcher interface {
	Mismatch() error
}

func interactive(p Protector) bool {
	i, ok := p.(Interactor)
	return ok && i.Interactive()
}
