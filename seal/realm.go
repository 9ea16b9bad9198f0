// Package seal keeps a realm's masters at rest: a realm file whose keyslots each wrap the one share that opens it.
//
// A slot's key comes from a Protector (a TPM, a passphrase); the kinds that carry a dependency are sub-packages. The share is 32
// random octets. It wraps every generation's master and authenticates the whole file, so that whoever opens a slot knows that no
// other slot, parameter or generation was changed by somebody who could not.
package seal

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"time"
)

// MasterSize is the length of a master in octets.
const MasterSize = KeySize

// A RealmIDFunc computes the realm id that a master gives.
type RealmIDFunc func(master []byte) ([16]byte, error)

// OpenConfig says how a realm file is opened.
type OpenConfig struct {
	// Protectors by kind. A slot of another kind is not opened, and the error says so.
	Protectors map[string]Protector
	// RealmID computes a master's realm id, which the file's must equal. Required.
	RealmID RealmIDFunc
	// Order lists the kinds to try, first to last; slots of other kinds are not tried. Nil: all kinds, in the file's order, with
	// those that need a human last. Empty but not nil: none.
	Order []string
	// Only, if it is not nil, is the one slot to try.
	Only *SlotID
	// Except, if it is not nil, is a slot not to try.
	Except *SlotID
	// Pin, if it is not nil, is the only realm to open: it is compared before any slot is tried, and after.
	Pin *RealmID
}

// An Opened realm holds its share and its masters, until Close. Not safe for concurrent use.
type Opened struct {
	file    *File
	share   Key
	masters []Key
	realmID RealmIDFunc
	slot    Slot
}

// Create makes a realm of one master (32 octets, copied), in memory and with no slot yet.
func Create(master []byte, realmID RealmIDFunc) (*Opened, error) {
	m, err := NewKey(master)
	if err != nil {
		return nil, fmt.Errorf("creating a realm: the master: %w", err)
	}
	if realmID == nil {
		return nil, errors.New("creating a realm: no function that computes its id")
	}
	id, err := realmID(m.Octets())
	if err != nil {
		return nil, fmt.Errorf("creating a realm: %w", err)
	}
	o := &Opened{share: RandomKey(), masters: []Key{m}, realmID: realmID}
	g := generation{number: 1, check: id}
	k := expand(o.share, generationInfo(id, 1))
	defer k.Wipe()
	g.wrapped = wrap(k, m.Octets(), generationAAD(Version, id, 1, id))
	return o, o.replace(&File{realm: id, require: 1, generations: []generation{g}})
}

// replace authenticates a changed file, and makes it the realm's.
func (o *Opened) replace(f *File) error {
	body, err := f.encodeBody(false)
	if err != nil {
		return err
	}
	f.mac = fileMAC(o.share, f.realm, body)
	o.file = f
	return nil
}

// Open tries the slots in turn, and returns the realm that the first one opens. If none does, the error is a *NoSlotError with
// the reason of each. ErrEdited and ErrOtherRealm end it at once: something is wrong with the file, and not with a slot.
func (f *File) Open(ctx context.Context, c OpenConfig) (*Opened, error) {
	if c.RealmID == nil {
		return nil, errors.New("opening a realm: no function that computes its id")
	}
	if c.Pin != nil && *c.Pin != f.realm {
		return nil, fmt.Errorf("%w: want realm %s, and this file is of realm %s", ErrOtherRealm, *c.Pin, f.realm)
	}
	failed := &NoSlotError{}
	for _, s := range f.candidates(c) {
		share, err := f.openSlot(ctx, s, c.Protectors[s.kind])
		if err == nil {
			return f.openWith(share, s, c.RealmID)
		}
		if ctx.Err() != nil {
			return nil, fmt.Errorf("opening slot %s (%s): %w", s.id, s.kind, context.Cause(ctx))
		}
		failed.Slots = append(failed.Slots, &SlotError{Slot: s.id, Kind: s.kind, Err: err})
	}
	return nil, failed
}

// candidates returns the slots to try, in order.
func (f *File) candidates(c OpenConfig) []slot {
	var out []slot
	for _, s := range f.slots {
		skip := c.Only != nil && s.id != *c.Only ||
			c.Except != nil && s.id == *c.Except ||
			c.Order != nil && !slices.Contains(c.Order, s.kind)
		if !skip {
			out = append(out, s)
		}
	}
	slices.SortStableFunc(out, func(a, b slot) int { return rank(a, c) - rank(b, c) })
	return out
}

func rank(s slot, c OpenConfig) int {
	if c.Order != nil {
		return slices.Index(c.Order, s.kind)
	}
	if p, ok := c.Protectors[s.kind]; ok && interactive(p) {
		return 1
	}
	return 0
}

// openSlot recovers the share by one slot.
func (f *File) openSlot(ctx context.Context, s slot, p Protector) (Key, error) {
	if p == nil {
		return Key{}, ErrUnknownKind
	}
	k, err := p.Open(ctx, Binding{Realm: f.realm, Slot: s.id}, s.params.Clone())
	if err != nil {
		return Key{}, err
	}
	defer k.Wipe()
	share, err := unwrap(k, s.wrapped, slotAAD(Version, f.realm, f.require, s.id, s.kind, s.params))
	if err != nil {
		if m, ok := p.(Mismatcher); ok {
			return Key{}, m.Mismatch()
		}
		return Key{}, ErrSlotEdited
	}
	defer clear(share)
	return NewKey(share)
}

// openWith authenticates the file by the share, unwraps all masters, and compares their realm ids.
func (f *File) openWith(share Key, s slot, realmID RealmIDFunc) (_ *Opened, err error) {
	o := &Opened{file: f, share: share, realmID: realmID, slot: Slot{ID: s.id, Kind: s.kind, Created: s.created, Params: s.params}}
	defer func() {
		if err != nil {
			o.Close()
		}
	}()
	body, err := f.encodeBody(false)
	if err != nil {
		return nil, err
	}
	if !hmac.Equal(fileMAC(share, f.realm, body), f.mac) {
		return nil, ErrEdited
	}
	for _, g := range f.generations {
		if err := o.addMaster(g); err != nil {
			return nil, err
		}
	}
	return o, nil
}

func (o *Opened) addMaster(g generation) error {
	k := expand(o.share, generationInfo(o.file.realm, g.number))
	defer k.Wipe()
	octets, err := unwrap(k, g.wrapped, generationAAD(Version, o.file.realm, g.number, g.check))
	if err != nil {
		return ErrEdited
	}
	defer clear(octets)
	m, err := NewKey(octets)
	if err != nil {
		return ErrEdited
	}
	o.masters = append(o.masters, m)
	id, err := o.realmID(m.Octets())
	if err != nil {
		return fmt.Errorf("computing the realm id of generation %d: %w", g.number, err)
	}
	if id != g.check {
		return fmt.Errorf("%w: the master of generation %d gives realm %s, and the file says %s", ErrOtherRealm, g.number, RealmID(id), g.check)
	}
	return nil
}

// Test opens one slot for real, by all checks that Open makes, and closes it again.
func (f *File) Test(ctx context.Context, id SlotID, c OpenConfig) error {
	if !slices.ContainsFunc(f.slots, func(s slot) bool { return s.id == id }) {
		return ErrSlotNotFound
	}
	c.Only, c.Except, c.Order = &id, nil, nil
	o, err := f.Open(ctx, c)
	var none *NoSlotError
	if errors.As(err, &none) && len(none.Slots) == 1 {
		return none.Slots[0].Err
	}
	if err != nil {
		return err
	}
	o.Close()
	return nil
}

// File returns the realm file as it is now, with slots added and removed.
func (o *Opened) File() *File { return o.file }

// Slot returns the slot that opened the realm; the zero Slot after Create.
func (o *Opened) Slot() Slot { return o.slot }

// Masters returns the masters themselves, 32 octets each, generation 1 first. Close wipes them.
func (o *Opened) Masters() [][]byte {
	out := make([][]byte, len(o.masters))
	for i, m := range o.masters {
		out[i] = m.Octets()
	}
	return out
}

// AddSlot enrolls a new slot of a kind. The change is in memory until Locked.Save.
func (o *Opened) AddSlot(ctx context.Context, kind string, p Protector) (Slot, error) {
	if !kindForm.MatchString(kind) || p == nil {
		return Slot{}, fmt.Errorf("adding a slot: %w", ErrUnknownKind)
	}
	if len(o.file.slots) >= maxSlots {
		return Slot{}, fmt.Errorf("adding a slot: a realm file has at most %d", maxSlots)
	}
	s := slot{kind: kind, created: time.Now().UTC().Truncate(time.Second)}
	rand.Read(s.id[:])
	params, k, err := p.Enroll(ctx, Binding{Realm: o.file.realm, Slot: s.id})
	if err != nil {
		return Slot{}, fmt.Errorf("adding a %s slot: %w", kind, err)
	}
	defer k.Wipe()
	if s.params, err = canonicalParams(params); err != nil {
		return Slot{}, fmt.Errorf("adding a %s slot: %w", kind, err)
	}
	s.wrapped = wrap(k, o.share.Octets(), slotAAD(Version, o.file.realm, o.file.require, s.id, kind, s.params))
	f := *o.file
	f.slots = append(slices.Clone(f.slots), s)
	return Slot{ID: s.id, Kind: kind, Created: s.created, Params: s.params.Clone()}, o.replace(&f)
}

// RemoveSlot removes one slot, in memory until Locked.Save. That is no revocation: a copy of the file from before still opens by
// it. Whether another slot opens is the caller's to find out, by OpenConfig.Except.
func (o *Opened) RemoveSlot(id SlotID) error {
	f := *o.file
	f.slots = slices.DeleteFunc(slices.Clone(f.slots), func(s slot) bool { return s.id == id })
	if len(f.slots) == len(o.file.slots) {
		return fmt.Errorf("removing slot %s: %w", id, ErrSlotNotFound)
	}
	return o.replace(&f)
}

// Close wipes the share and the masters. What the runtime copied stays until the process ends.
func (o *Opened) Close() {
	o.share.Wipe()
	for _, m := range o.masters {
		m.Wipe()
	}
	o.masters = nil
}
