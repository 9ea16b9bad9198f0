// Package hypervisor is the domain: who a virtual machine on this host is, which boot it is in, and whether that boot still
// has a right to keys (its ticket). It knows no hypervisor's interface; hypervisor/libvirt does.
package hypervisor

import (
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Bounds of what a domain may say about itself.
const (
	MaxNameLen = 251 // octets of a domain's name: libvirt makes a file of it, with ".pid" behind
	MaxOffered = 64  // key names in one domain's metadata
	maxKeyName = 63
	minCID     = 3              // 0 to 2 are the hypervisor, loopback and the host
	maxCID     = 0xffffffff - 1 // the last is VMADDR_CID_ANY
)

// Tiers that a domain may claim for itself. The policy decides which one it has.
const (
	TierVM   = "vm"
	TierSNP  = "snp"
	TierUser = "user"
)

// Domain is what the hypervisor says of one virtual machine.
type Domain struct {
	UUID      string   // canonical: lower case, 36 octets
	Name      string   // UTF-8 without control characters and slashes, at most MaxNameLen octets
	CID       uint32   // vsock address; 0: it has none, or none yet
	Tier      string   // what its metadata claims: TierVM, TierSNP, TierUser, or "" for no claim
	Offered   []string // key names in its metadata, in its order, each once
	Metadata  bool     // its metadata has our element
	Running   bool     // it has a process, even when it is paused
	Paused    bool     // it has a process, and its processors stand still
	PID       int      // its process; 0: not known
	StartTime uint64   // of that process, field 22 of /proc/PID/stat; 0: not known
	Problem   string   // why its definition could not be read; what was not read is empty then
}

// Boot is one boot of one domain: the process that runs it and how often the guest was seen to reset in it. The zero Boot is
// no boot.
type Boot struct {
	UUID      string `json:"uuid,omitzero"`
	PID       int    `json:"pid,omitzero"`
	StartTime uint64 `json:"start_time,omitzero"`
	Resets    uint64 `json:"resets,omitzero"`
}

// String returns the boot as the audit log names it: uuid/pid/start time/resets.
func (b Boot) String() string {
	return fmt.Sprintf("%s/%d/%d/%d", b.UUID, b.PID, b.StartTime, b.Resets)
}

// SameProcess says whether both boots are of one process, whatever resets were seen in it. No boot is like no other.
func (b Boot) SameProcess(o Boot) bool {
	return b.known() && b.UUID == o.UUID && b.PID == o.PID && b.StartTime == o.StartTime
}

func (b Boot) known() bool { return b.UUID != "" && b.PID > 0 && b.StartTime > 0 }

// ParseUUID returns the canonical form of a UUID in its usual notation of 36 octets, and refuses the one of all zeros.
func ParseUUID(s string) (string, error) {
	raw, err := UUIDBytes(s)
	if err != nil {
		return "", err
	}
	if raw == [16]byte{} {
		return "", errors.New("reading a UUID: all zeros is not one")
	}
	return strings.ToLower(s), nil
}

// UUIDBytes returns the 16 octets of a UUID in its usual notation.
func UUIDBytes(s string) ([16]byte, error) {
	var raw [16]byte
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return raw, fmt.Errorf("reading a UUID: want 36 octets such as 11111111-2222-3333-4444-555555555555, got %s", quote(s))
	}
	digits := s[:8] + s[9:13] + s[14:18] + s[19:23] + s[24:]
	if _, err := hex.Decode(raw[:], []byte(digits)); err != nil {
		return [16]byte{}, fmt.Errorf("reading a UUID: want hexadecimal digits, got %s", quote(s))
	}
	return raw, nil
}

// checkName refuses what cannot be a libvirt domain's name or would not be safe to show.
func checkName(s string) error {
	switch {
	case s == "":
		return errors.New("reading a domain's name: it is empty")
	case len(s) > MaxNameLen:
		return fmt.Errorf("reading a domain's name: %d octets, at most %d are allowed", len(s), MaxNameLen)
	case !utf8.ValidString(s) || strings.ContainsRune(s, '/') || strings.ContainsFunc(s, unicode.IsControl):
		return fmt.Errorf("reading a domain's name: %s has a slash, a control character or bad UTF-8", quote(s))
	}
	return nil
}

// checkKeyName holds the rule of service names: [a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?
func checkKeyName(s string) error {
	inner := func(c rune) bool { return !alphanumeric(c) && c != '.' && c != '-' }
	if s == "" || len(s) > maxKeyName || strings.ContainsFunc(s, inner) || !alphanumeric(rune(s[0])) || !alphanumeric(rune(s[len(s)-1])) {
		return fmt.Errorf("reading a key's name: %s is none; want 1 to %d of a-z, 0-9, \".\" and \"-\", beginning and ending with a letter or digit", quote(s), maxKeyName)
	}
	return nil
}

func alphanumeric(c rune) bool { return c >= 'a' && c <= 'z' || c >= '0' && c <= '9' }

// checkOffered refuses a list of key names that is too long, repeats a name or holds what is not a name.
func checkOffered(names []string) error {
	if len(names) > MaxOffered {
		return fmt.Errorf("reading the key names: more than %d", MaxOffered)
	}
	seen := make(map[string]bool, len(names))
	for _, n := range names {
		if err := checkKeyName(n); err != nil {
			return err
		}
		if seen[n] {
			return fmt.Errorf("reading the key names: %q stands there twice", n)
		}
		seen[n] = true
	}
	return nil
}

func checkTier(s string) error {
	switch s {
	case "", TierVM, TierSNP, TierUser:
		return nil
	}
	return fmt.Errorf("reading the tier: want %s, %s or %s, got %s", TierVM, TierSNP, TierUser, quote(s))
}

func checkCID(cid uint64) error {
	if cid < minCID || cid > maxCID {
		return fmt.Errorf("reading the vsock address: CID %d is outside %d to %d", cid, minCID, uint32(maxCID))
	}
	return nil
}

// quote makes foreign text safe to show and short.
func quote(s string) string {
	const most = 64
	if len(s) > most {
		return fmt.Sprintf("%+q and %d octets more", s[:most], len(s)-most)
	}
	return fmt.Sprintf("%+q", s)
}
