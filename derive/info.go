package derive

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"keybroker/internal/tuple"
)

// Tiers that have VM keys.
const (
	TierVM  = "vm"
	TierSNP = "snp"
)

// Labels under which a holder signs with the realm's identity. It signs nothing else.
const (
	LabelRelease = "keybroker/v1 release"
	LabelAudit   = "keybroker/v1 audit"
)

const (
	maxName     = 63
	subjectSize = 36
	kindService = "service"

	labelPrefix   = "keybroker/v1 "
	labelKey      = "key"
	labelRealmID  = "realm id"
	labelIdentity = "identity"
)

// VMKeyID says which key of a virtual machine is meant.
type VMKeyID struct {
	Tier    string // TierVM or TierSNP
	Subject string // the subject's UUID: lower case, 36 octets
	Name    string // as CheckKeyName accepts it
	Epoch   uint32 // from 1
	Length  int    // octets, 32 or 64
}

// CheckKeyName accepts the names that keys can have: [a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?.
func CheckKeyName(name string) error {
	if name == "" || len(name) > maxName {
		return fmt.Errorf("a key name has 1 to %d characters, this one has %d", maxName, len(name))
	}
	for i := range len(name) {
		inner := i > 0 && i < len(name)-1
		if c := name[i]; !isLower(c) && !isDigit(c) && !(inner && (c == '.' || c == '-')) {
			return fmt.Errorf("a key name has a-z, 0-9 and, inside, dot and hyphen: character %d is %q", i+1, c)
		}
	}
	return nil
}

// CheckSubject accepts a UUID in its lower-case form of 36 octets.
func CheckSubject(subject string) error {
	if len(subject) != subjectSize {
		return fmt.Errorf("a subject is a UUID of %d characters, this has %d", subjectSize, len(subject))
	}
	for i := range len(subject) {
		c := subject[i]
		if hyphen := i == 8 || i == 13 || i == 18 || i == 23; hyphen != (c == '-') ||
			!hyphen && !isDigit(c) && (c < 'a' || c > 'f') {
			return fmt.Errorf("a subject is a UUID in lower case: character %d is %q", i+1, c)
		}
	}
	return nil
}

// CheckKeyLength accepts the lengths that keys can have, 32 and 64 octets.
func CheckKeyLength(length int) error {
	if length != 32 && length != 64 {
		return fmt.Errorf("a key has 32 or 64 octets, not %d", length)
	}
	return nil
}

func isLower(c byte) bool { return c >= 'a' && c <= 'z' }
func isDigit(c byte) bool { return c >= '0' && c <= '9' }

// ServiceInfo returns the info of a service key of length octets. In epoch 1 that is the bare name, so that the key equals
// any HKDF-SHA256 of the master with the name as info. Epoch 0 is an error.
func ServiceInfo(name string, epoch uint32, length int) ([]byte, error) {
	if err := checkKey(name, epoch, length); err != nil {
		return nil, err
	}
	if epoch == 1 {
		return []byte(name), nil
	}
	return keyInfo(kindService, "", name, epoch, length), nil
}

// VMInfo returns the info of a VM key of length octets. Epoch 0 is an error.
func VMInfo(tier, subject, name string, epoch uint32, length int) ([]byte, error) {
	if tier != TierVM && tier != TierSNP {
		return nil, fmt.Errorf("tier %q has no VM keys: it is %q or %q", tier, TierVM, TierSNP)
	}
	if err := CheckSubject(subject); err != nil {
		return nil, err
	}
	if err := checkKey(name, epoch, length); err != nil {
		return nil, err
	}
	return keyInfo(tier, subject, name, epoch, length), nil
}

// RealmIDInfo returns the info of the realm id, which has 16 octets.
func RealmIDInfo() []byte { return info(labelRealmID) }

// IdentityInfo returns the info of the seed of the realm's identity in epoch i, which has 32 octets.
func IdentityInfo(i uint32) []byte { return info(labelIdentity, tuple.Uint32(i)) }

func checkKey(name string, epoch uint32, length int) error {
	if err := CheckKeyName(name); err != nil {
		return err
	}
	if epoch == 0 {
		return errors.New("a key has no epoch 0: the first is 1")
	}
	return CheckKeyLength(length)
}

func keyInfo(kind, subject, name string, epoch uint32, length int) []byte {
	return info(labelKey, []byte(kind), []byte(subject), []byte(name), tuple.Uint32(epoch), tuple.Uint32(uint32(length)))
}

// info is the one function that builds structured info. It starts with an octet that no name contains.
func info(label string, fields ...[]byte) []byte {
	out := append([]byte{0}, tuple.Encode([]byte(labelPrefix+label))...)
	return append(out, tuple.Encode(fields...)...)
}

// checkKeyInfo accepts what ServiceInfo and VMInfo return for this length, and nothing else: above all not the info of the
// realm id or of an identity.
func checkKeyInfo(got []byte, length int) error {
	if len(got) == 0 || got[0] != 0 {
		_, err := ServiceInfo(string(got), 1, length)
		return err
	}
	fields, err := splitTuple(got[1:], 6)
	if err != nil {
		return err
	}
	if len(fields) != 6 || len(fields[4]) != 4 {
		return errors.New("this is not the info of a key")
	}
	kind, subject, name := string(fields[1]), string(fields[2]), string(fields[3])
	epoch := binary.BigEndian.Uint32(fields[4])
	var want []byte
	if kind == kindService {
		want, err = ServiceInfo(name, epoch, length)
	} else {
		want, err = VMInfo(kind, subject, name, epoch, length)
	}
	if err != nil {
		return err
	}
	// What was taken apart is built again: the label, the length and anything that was overlooked must be equal.
	if !bytes.Equal(got, want) {
		return fmt.Errorf("this is not the info of a key of %d octets", length)
	}
	return nil
}

// splitTuple takes E(x1..xn) apart. It fails when octets are left over, or when there are more than limit fields.
func splitTuple(b []byte, limit int) ([][]byte, error) {
	var fields [][]byte
	for len(b) > 0 {
		if len(b) < 4 || uint64(binary.BigEndian.Uint32(b)) > uint64(len(b)-4) {
			return nil, fmt.Errorf("field %d is cut short", len(fields)+1)
		}
		if len(fields) == limit {
			return nil, fmt.Errorf("more than %d fields", limit)
		}
		n := int(binary.BigEndian.Uint32(b))
		fields, b = append(fields, b[4:4+n]), b[4+n:]
	}
	return fields, nil
}
