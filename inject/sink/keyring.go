//go:build linux

package sink

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// Keyring is a kernel keyring that takes the key. See keyrings(7).
type Keyring struct {
	// Type is "user", whose payload root's processes can read, or "logon", whose payload only the kernel can. Required.
	Type string
	// Description names the key; a logon key's must contain a colon. Required.
	Description string
	// Ring is "@u" (the user's), "@us" (the user's session) or "@s" (this process's session). Required.
	Ring string
}

// Rings are the keyrings that may be named, and what the kernel calls them.
var rings = map[string]int{
	"@s":  unix.KEY_SPEC_SESSION_KEYRING,
	"@u":  unix.KEY_SPEC_USER_KEYRING,
	"@us": unix.KEY_SPEC_USER_SESSION_KEYRING,
}

// Permissions of a key, keyctl_setperm(3): the possessor's in the highest octet, then the owner's.
const (
	permView, permRead, permWrite, permSearch, permLink, permSetattr = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20

	permPossessor = (permView | permRead | permWrite | permSearch | permLink | permSetattr) << 24
	permUser      = permPossessor | (permView|permRead|permSearch|permLink)<<16
	permLogon     = permPossessor | (permView|permSearch|permLink)<<16
)

// Check says what is wrong with the configuration.
func (r *Keyring) Check() error {
	if r.Type != "user" && r.Type != "logon" {
		return fmt.Errorf("keyring type %q, expected user or logon", r.Type)
	}
	if _, ok := rings[r.Ring]; !ok {
		return fmt.Errorf("keyring %q, expected @u, @us or @s", r.Ring)
	}
	if n := len(r.Description); n == 0 || n > 255 || slices.ContainsFunc([]byte(r.Description), func(c byte) bool { return c <= ' ' || c > '~' }) {
		return errors.New("a description of 1 to 255 printable characters without blanks is expected")
	}
	if i := slices.Index([]byte(r.Description), ':'); r.Type == "logon" && i < 1 {
		return fmt.Errorf("the description %q of a logon key needs a prefix and a colon, as in keybroker:disk", r.Description)
	}
	return nil
}

// Put adds the key to the ring, or gives the key of this description there its new octets.
func (r *Keyring) Put(_ context.Context, k Key) (Result, error) {
	ring, ok := rings[r.Ring]
	if !ok {
		return Result{}, fmt.Errorf("keyring %q, expected @u, @us or @s", r.Ring)
	}
	id, err := unix.AddKey(r.Type, r.Description, k.Octets(), ring)
	if err != nil {
		return Result{}, fmt.Errorf("adding the %s key %q to %s: %w", r.Type, r.Description, r.Ring, err)
	}
	perm := uint32(permUser)
	if r.Type == "logon" {
		perm = permLogon
	}
	if err := unix.KeyctlSetperm(id, perm); err != nil {
		return Result{}, fmt.Errorf("setting the permissions of key %q: %w", r.Description, err)
	}
	return Result{Place: r.place()}, nil
}

func (r *Keyring) place() string { return r.Ring + " " + r.Type + " " + r.Description }

// Holds says whether the key is still in the ring.
func (r *Keyring) Holds() (bool, error) {
	ring, ok := rings[r.Ring]
	if !ok {
		return false, fmt.Errorf("keyring %q, expected @u, @us or @s", r.Ring)
	}
	_, err := unix.KeyctlSearch(ring, r.Type, r.Description, 0)
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, unix.ENOKEY), errors.Is(err, unix.EKEYEXPIRED), errors.Is(err, unix.EKEYREVOKED):
		return false, nil
	}
	return false, fmt.Errorf("looking for key %q in %s: %w", r.Description, r.Ring, err)
}
