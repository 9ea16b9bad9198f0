// Package passphrase protects a keyslot by a passphrase that a person or a file gives, through Argon2id.
package passphrase

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"golang.org/x/crypto/argon2"

	"keybroker/internal/octet"
	"keybroker/internal/tuple"
	"keybroker/seal"
)

// Kind is the kind of these slots in a realm file.
const Kind = "passphrase"

// Bounds of a passphrase, in octets. The lower one holds for new passphrases only.
const (
	MinLength = 8
	MaxLength = 1024
)

// Bounds of what a realm file may ask of Argon2id, checked before anything is computed.
const (
	minMemory, maxMemory   = 8 << 10, 1 << 20 // KiB
	minTime, maxTime       = 1, 16
	minThreads, maxThreads = 1, 16
	minSalt, maxSalt       = 16, 64 // octets
)

// The cost of new slots: the second recommended choice of RFC 9106, section 4.
const (
	defaultTime    = 3
	defaultMemory  = 64 << 10 // KiB
	defaultThreads = 4
	newSalt        = 32 // octets
)

// What can be wrong with a passphrase.
var (
	ErrWrong    = errors.New("wrong passphrase")
	ErrNone     = errors.New("the passphrase is empty")
	ErrTooShort = fmt.Errorf("the passphrase is too short: want at least %d octets", MinLength)
	ErrTooLong  = fmt.Errorf("the passphrase is too long: want at most %d octets", MaxLength)
	// ErrParams: the slot's parameters are not such as this package writes.
	ErrParams = errors.New("the slot's parameters are damaged or out of bounds")
)

// Config says where passphrases come from and what new slots cost.
type Config struct {
	// Ask returns the passphrase of a slot that is being opened, in octets of its own: they are wiped after use. Required to Open.
	Ask func(ctx context.Context) ([]byte, error)
	// AskNew returns the passphrase of a new slot, likewise. Required to Enroll.
	AskNew func(ctx context.Context) ([]byte, error)
	// Human says that Ask waits for a person.
	Human bool
	// Time, MemoryKiB and Threads are Argon2id's cost for new slots. Zero: 3 passes, 64 MiB, 4 threads.
	Time, MemoryKiB uint32
	Threads         uint8
}

// A Protector opens and makes passphrase slots.
type Protector struct {
	c Config
}

// New returns a protector. It fails if the cost is out of bounds.
func New(c Config) (*Protector, error) {
	if c.Time == 0 {
		c.Time = defaultTime
	}
	if c.MemoryKiB == 0 {
		c.MemoryKiB = defaultMemory
	}
	if c.Threads == 0 {
		c.Threads = defaultThreads
	}
	p := params{KDF: kdfName, Time: c.Time, MemoryKiB: c.MemoryKiB, Threads: uint32(c.Threads), Salt: make([]byte, newSalt)}
	if err := p.check(); err != nil {
		return nil, fmt.Errorf("setting the cost of passphrase slots: %w", err)
	}
	return &Protector{c: c}, nil
}

const kdfName = "argon2id"

// params are a slot's public parameters.
type params struct {
	KDF       string       `json:"kdf"`
	Time      uint32       `json:"time"`
	MemoryKiB uint32       `json:"memory_kib"`
	Threads   uint32       `json:"threads"`
	Salt      octet.Base64 `json:"salt"`
}

func (p *params) check() error {
	ok := p.KDF == kdfName &&
		p.Time >= minTime && p.Time <= maxTime &&
		p.MemoryKiB >= minMemory && p.MemoryKiB <= maxMemory &&
		p.Threads >= minThreads && p.Threads <= maxThreads &&
		len(p.Salt) >= minSalt && len(p.Salt) <= maxSalt
	if !ok {
		return ErrParams
	}
	return nil
}

func parse(raw jsontext.Value) (*params, error) {
	var p params
	if err := json.Unmarshal(raw, &p, json.RejectUnknownMembers(true)); err != nil {
		return nil, ErrParams // the library's error may quote the file
	}
	if err := p.check(); err != nil {
		return nil, err
	}
	return &p, nil
}

// saltInput makes Argon2id's salt: the same passphrase gives another key in another slot or realm.
func saltInput(b seal.Binding, salt []byte) []byte {
	return tuple.Encode([]byte("keybroker/v1 slot passphrase"), b.Realm[:], b.Slot[:], salt)
}

// key computes the slot's key and wipes the passphrase.
func (p *params) key(b seal.Binding, passphrase []byte) (seal.Key, error) {
	defer clear(passphrase)
	out := argon2.IDKey(passphrase, saltInput(b, p.Salt), p.Time, p.MemoryKiB, uint8(p.Threads), seal.KeySize)
	defer clear(out)
	return seal.NewKey(out)
}

// Enroll asks for a new passphrase.
func (p *Protector) Enroll(ctx context.Context, b seal.Binding) (jsontext.Value, seal.Key, error) {
	if p.c.AskNew == nil {
		return nil, seal.Key{}, errors.New("no source of a new passphrase")
	}
	passphrase, err := p.c.AskNew(ctx)
	if err != nil {
		return nil, seal.Key{}, err
	}
	if err := CheckNew(passphrase); err != nil {
		return nil, seal.Key{}, err
	}
	ps := params{KDF: kdfName, Time: p.c.Time, MemoryKiB: p.c.MemoryKiB, Threads: uint32(p.c.Threads), Salt: make([]byte, newSalt)}
	rand.Read(ps.Salt)
	raw, err := json.Marshal(&ps, json.Deterministic(true))
	if err != nil {
		return nil, seal.Key{}, fmt.Errorf("encoding the slot's parameters: %w", err)
	}
	k, err := ps.key(b, passphrase)
	return raw, k, err
}

// CheckNew says whether a passphrase may be that of a new slot: ErrNone, ErrTooShort and ErrTooLong are the reasons why not.
func CheckNew(passphrase []byte) error {
	switch {
	case len(passphrase) == 0:
		return ErrNone
	case len(passphrase) < MinLength:
		return ErrTooShort
	case len(passphrase) > MaxLength:
		return ErrTooLong
	}
	return nil
}

// Open asks for the slot's passphrase. A wrong one gives a wrong key and no error; see Mismatch.
func (p *Protector) Open(ctx context.Context, b seal.Binding, raw jsontext.Value) (seal.Key, error) {
	ps, err := parse(raw)
	if err != nil {
		return seal.Key{}, err
	}
	if p.c.Ask == nil {
		return seal.Key{}, errors.New("no source of a passphrase")
	}
	passphrase, err := p.c.Ask(ctx)
	if err != nil {
		return seal.Key{}, err
	}
	switch {
	case len(passphrase) == 0:
		return seal.Key{}, ErrNone
	case len(passphrase) > MaxLength:
		clear(passphrase)
		return seal.Key{}, ErrTooLong
	}
	return ps.key(b, passphrase)
}

// Mismatch is why a share did not unwrap: ErrWrong.
func (p *Protector) Mismatch() error { return ErrWrong }

// Interactive reports whether a person must type the passphrase.
func (p *Protector) Interactive() bool { return p.c.Human }

// Describe returns the cost, as "argon2id 64 MiB, 3 passes".
func (p *Protector) Describe(raw jsontext.Value) (string, error) {
	ps, err := parse(raw)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("argon2id, %d MiB, %d passes", ps.MemoryKiB>>10, ps.Time), nil
}
