package derive

import (
	"crypto/ed25519"
	"encoding/hex"
	"fmt"
	"slices"

	"keybroker/internal/tuple"
)

// RealmIDSize is the length of a realm id in octets.
const RealmIDSize = 16

// maxMessage bounds what is signed after the label: E(fields...), in octets.
const maxMessage = 64 << 10

// maxFields bounds the number of fields that are signed.
const maxFields = 256

// RealmID names a realm and tells whether the right master was found. It is derived from the master of the first generation
// and is no secret.
type RealmID [RealmIDSize]byte

// String returns 32 hexadecimal digits in lower case.
func (id RealmID) String() string { return hex.EncodeToString(id[:]) }

// Schedule is the key schedule of one generation, computed in this process: the holder for whoever just opened the realm,
// and what every other holder must equal. It is safe for concurrent use, but for Wipe.
type Schedule struct {
	prk      secret
	signer   secret // the Ed25519 private key, epoch 1
	realm    RealmID
	identity ed25519.PublicKey
}

// NewSchedule makes the schedule of a master, of which it keeps only what is extracted from it.
func NewSchedule(master Master) (*Schedule, error) {
	octets, err := master.Octets()
	if err != nil {
		return nil, fmt.Errorf("making a key schedule: %w", err)
	}
	prk, err := extract(octets)
	if err != nil {
		return nil, err
	}
	return newSchedule(prk)
}

// newSchedule takes ownership of prk, which may lie in a page that cannot be written.
func newSchedule(prk []byte) (*Schedule, error) {
	id, err := expand(prk, RealmIDInfo(), RealmIDSize)
	if err != nil {
		return nil, err
	}
	seed, err := expand(prk, IdentityInfo(1), ed25519.SeedSize)
	if err != nil {
		return nil, err
	}
	private := ed25519.NewKeyFromSeed(seed)
	clear(seed)
	return &Schedule{
		prk:      newSecret(prk),
		signer:   newSecret(private),
		realm:    RealmID(id),
		identity: private.Public().(ed25519.PublicKey),
	}, nil
}

// RealmID returns the id of the realm whose first generation this is.
func (s *Schedule) RealmID() RealmID { return s.realm }

// Identity returns the public key that verifies what Sign signed: the realm's identity in epoch 1.
func (s *Schedule) Identity() ed25519.PublicKey { return slices.Clone(s.identity) }

// ServiceKey derives the key of a service or container, of length octets (32 or 64), in an epoch (from 1).
func (s *Schedule) ServiceKey(name string, epoch uint32, length int) (ServiceKey, error) {
	info, err := ServiceInfo(name, epoch, length)
	if err != nil {
		return ServiceKey{}, fmt.Errorf("deriving a service key: %w", err)
	}
	key, err := s.derive(info, length)
	if err != nil {
		return ServiceKey{}, fmt.Errorf("deriving a service key: %w", err)
	}
	return ServiceKey{newSecret(key)}, nil
}

// VMKey derives a key of a virtual machine.
func (s *Schedule) VMKey(id VMKeyID) (VMKey, error) {
	info, err := VMInfo(id.Tier, id.Subject, id.Name, id.Epoch, id.Length)
	if err != nil {
		return VMKey{}, fmt.Errorf("deriving a VM key: %w", err)
	}
	key, err := s.derive(info, id.Length)
	if err != nil {
		return VMKey{}, fmt.Errorf("deriving a VM key: %w", err)
	}
	return VMKey{newSecret(key)}, nil
}

// Sign returns the identity's Ed25519 signature, 64 octets, over E(label, fields...). The label is LabelRelease or
// LabelAudit; any other is refused with ErrRefused. The fields have at most 64 KiB together, their lengths included.
func (s *Schedule) Sign(label string, fields ...[]byte) ([]byte, error) {
	message := signedTuple(label, fields)
	if err := checkSigned(message); err != nil {
		return nil, fmt.Errorf("signing: %w", err)
	}
	return s.sign(message)
}

// Wipe overwrites the secrets. Afterwards every derivation fails with ErrNoKey. It must not run beside other uses.
func (s *Schedule) Wipe() {
	s.prk.wipe()
	s.signer.wipe()
}

func (s *Schedule) derive(info []byte, length int) ([]byte, error) {
	prk, err := s.prk.octets()
	if err != nil {
		return nil, err
	}
	return expand(prk, info, length)
}

// sign signs what checkSigned has accepted.
func (s *Schedule) sign(message []byte) ([]byte, error) {
	private, err := s.signer.octets()
	if err != nil {
		return nil, err
	}
	return ed25519.Sign(private, message), nil
}

// signedTuple returns E(label, fields...), the octets that are signed.
func signedTuple(label string, fields [][]byte) []byte {
	return append(tuple.Encode([]byte(label)), tuple.Encode(fields...)...)
}

// checkSigned accepts E(label, fields...) with a label of ours. Nothing else is ever signed with the identity.
func checkSigned(message []byte) error {
	fields, err := splitTuple(message, 1+maxFields)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	if len(fields) == 0 || string(fields[0]) != LabelRelease && string(fields[0]) != LabelAudit {
		return fmt.Errorf("%w: the identity signs under the labels %q and %q only", ErrRefused, LabelRelease, LabelAudit)
	}
	if n := len(message) - 4 - len(fields[0]); n > maxMessage {
		return fmt.Errorf("%w: the fields to sign have %d octets, the limit is %d", ErrRefused, n, maxMessage)
	}
	return nil
}
