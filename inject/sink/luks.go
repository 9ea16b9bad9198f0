//go:build linux

package sink

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
)

// LUKS is a volume on a disk that belongs to the host, opened with a key. Its header is held to an allow list, and used from a
// copy in memory.
type LUKS struct {
	Device string // required: a path below /dev
	Mapper string // required: the volume appears as /dev/mapper/Mapper
	// Recorded is the UUID of the volume that this agent has opened, or began to open, as Mapper in this boot; "" for none.
	// A mapping that is there already is accepted only if it is that one.
	Recorded string
	// Record is called with the volume's UUID before it is opened; an error stops that. Required.
	Record func(uuid string) error
}

// volume is one look at the device.
type volume struct {
	device  *device
	head    *snapshot
	program string
}

func (l *LUKS) look() (*volume, error) {
	program, err := findProgram()
	if err != nil {
		return nil, err
	}
	d, err := openDevice(l.Device)
	if err != nil {
		return nil, err
	}
	head, err := newSnapshot(d, d.size)
	if err != nil {
		d.Close()
		return nil, err
	}
	return &volume{device: d, head: head, program: program}, nil
}

func (v *volume) close() {
	v.device.Close()
	v.head.Close()
}

// Put opens the volume with the key. It formats the device first if that is blank and the key's Create says so. It returns
// ErrHeader, ErrNotBlank, ErrNoVolume, ErrWrongKey, ErrOldEpoch or ErrTaken for what it refuses, and a NeedEpochError when the
// volume is of an earlier epoch. The volume is open only if the error is nil.
func (l *LUKS) Put(ctx context.Context, k Key) (Result, error) {
	v, err := l.look()
	if err != nil {
		return Result{}, err
	}
	defer v.close()
	present, err := findMapping(l.Mapper)
	if err != nil && !errors.Is(err, errNoMapping) {
		return Result{}, err
	}
	if present != nil {
		k.Create = false // what is in use is not blank, whatever the host shows of it
	}
	h, formatted, err := v.header(ctx, k)
	if err != nil {
		return Result{}, err
	}
	id, slot, err := h.keyslotFor(k)
	if err != nil {
		return Result{}, err
	}
	r := Result{ID: h.uuid, Formatted: formatted, Place: l.place()}
	if present != nil {
		err = l.verify(ctx, v, h, present, slot, k)
		r.Already = true
	} else {
		err = l.open(ctx, v, h, slot, k)
	}
	if err != nil {
		return Result{}, err
	}
	r.Opened = true
	if len(h.tokens) > 1 { // Rekey was ended by a crash between its two steps
		r.Leftover = v.dropOthers(h, id)
	}
	return r, nil
}

func (l *LUKS) place() string { return l.Device + " as /dev/mapper/" + l.Mapper }

// header reads and checks the volume's header, or makes a volume where that is allowed.
func (v *volume) header(ctx context.Context, k Key) (h *header, formatted bool, err error) {
	h, err = readHeader(v.head)
	if interrupted(v.head) { // its second copy may look finished
		h, err = nil, errNoHeader
	}
	if errors.Is(err, errNoHeader) {
		if err := v.mayFormat(); err != nil {
			return nil, false, err
		}
		if !k.Create {
			return nil, false, fmt.Errorf("%w: %s is blank; a volume was opened with key %s before, so this may be the wrong or an empty disk", ErrNoVolume, v.device.path, k.Name)
		}
		h, err = v.format(ctx, k)
		return h, true, err
	}
	if err != nil {
		return nil, false, err
	}
	if err := h.check(k.Pins, uint64(v.device.size)); err != nil {
		return nil, false, err
	}
	if len(h.tokens) == 0 {
		return h, false, v.adopt(ctx, h, k)
	}
	return h, false, nil
}

// adopt gives a volume without a token one, if it may still be created and the key opens it: a volume that was formatted by
// other means, or lost its token.
func (v *volume) adopt(ctx context.Context, h *header, k Key) error {
	if !k.Create {
		return refuse(`it has no token of keybroker; if the volume is the right one, give it one: `+
			`echo '{"type":"keybroker","keyslots":["0"],"name":%q,"epoch":1}' | cryptsetup token import --json-file - %s`, k.Name, v.device.path)
	}
	if err := v.head.use(h); err != nil {
		return err
	}
	for _, slot := range slices.Sorted(maps.Keys(h.meta.Keyslots)) {
		err := testKey(ctx, v.program, v.head, v.device.path, slot, k.Octets())
		if err == nil {
			h.addToken(k, slot)
			return v.writeHeader(h)
		}
		if !errors.Is(err, ErrWrongKey) {
			return err
		}
	}
	return fmt.Errorf("%w: %s has a LUKS2 volume of somebody else", ErrNotBlank, v.device.path)
}

// keyslotFor finds the token and the keyslot that a key should open.
func (h *header) keyslotFor(k Key) (id, slot string, err error) {
	_, newest := h.newestToken()
	if newest.Name != k.Name {
		return "", "", refuse("the volume belongs to key %q, not to %q: is the device the right one?", newest.Name, k.Name)
	}
	if k.Epoch < newest.Epoch {
		return "", "", fmt.Errorf("%w: got epoch %d, the volume is of epoch %d", ErrOldEpoch, k.Epoch, newest.Epoch)
	}
	id, t, ok := h.tokenOfEpoch(k.Epoch)
	if !ok {
		return "", "", &NeedEpochError{Epoch: newest.Epoch}
	}
	return id, t.Keyslots[0], nil
}

// open makes the mapping from the header in memory, and looks whether it is what it should be.
func (l *LUKS) open(ctx context.Context, v *volume, h *header, slot string, k Key) error {
	if !v.device.block {
		return fmt.Errorf("opening %s: it is no block device; losetup makes one of a file", l.Device)
	}
	if err := v.head.use(h); err != nil {
		return err
	}
	if err := v.head.seal(); err != nil {
		return err
	}
	if err := l.Record(h.uuid); err != nil {
		return err
	}
	p := program{path: v.program, header: v.head.memory, key: k.Octets()}
	if err := p.run(ctx, keyArgs([]string{"open"}, slot, len(p.key), v.device.path, l.Mapper)...); err != nil {
		return l.explain(err, h)
	}
	m, err := findMapping(l.Mapper)
	if err == nil && !m.of(h.uuid, l.Mapper, v.device.rdev) {
		err = errors.New("the mapping is not of this volume")
	}
	if err == nil {
		_, err = os.Stat("/dev/mapper/" + l.Mapper)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("opening %s: %w", l.Device, err), l.undo(ctx, v))
	}
	return nil
}

// undo closes what open has made and does not trust.
func (l *LUKS) undo(ctx context.Context, v *volume) error {
	p := program{path: v.program}
	return p.run(context.WithoutCancel(ctx), "close", "--", l.Mapper)
}

// verify accepts a mapping that is there already: this agent's own, of this volume, on this device, and the key opens it.
func (l *LUKS) verify(ctx context.Context, v *volume, h *header, m *mapping, slot string, k Key) error {
	if l.Recorded != h.uuid || !m.of(h.uuid, l.Mapper, v.device.rdev) {
		return fmt.Errorf("%w: /dev/mapper/%s is open and not opened by this agent in this boot: close it (`cryptsetup close %[2]s`) or give the key another mapper", ErrTaken, l.Mapper)
	}
	if err := v.head.use(h); err != nil {
		return err
	}
	if err := testKey(ctx, v.program, v.head, v.device.path, slot, k.Octets()); err != nil {
		return l.explain(err, h)
	}
	return nil
}

func (l *LUKS) explain(err error, h *header) error {
	if errors.Is(err, ErrWrongKey) {
		return fmt.Errorf("%w: %s (LUKS UUID %s) was formatted with another one: another realm, or this domain had another UUID then (the policy entry's subject)", err, l.Device, h.uuid)
	}
	if strings.Contains(err.Error(), "device-mapper") {
		return fmt.Errorf("opening %s: %w: are the kernel's modules dm-crypt, xts and aes loaded, or in the initramfs?", l.Device, err)
	}
	return fmt.Errorf("opening %s: %w", l.Device, err)
}

// Rekey lets the key new into a volume that is of old's epoch, and takes old out once the volume is known to open with new.
// After a crash at any moment the volume opens with old or with new. The volume may be open.
func (l *LUKS) Rekey(ctx context.Context, old, new Key) error {
	v, err := l.look()
	if err != nil {
		return err
	}
	defer v.close()
	h, err := readHeader(v.head)
	if err != nil {
		return err
	}
	if err := h.check(new.Pins, uint64(v.device.size)); err != nil {
		return err
	}
	_, slot, err := h.keyslotFor(old)
	if err != nil {
		return err
	}
	if err := v.head.use(h); err != nil {
		return err
	}
	tokens := h.tokens
	h, added, err := v.addKey(ctx, h, slot, old, new)
	if err != nil {
		return l.explain(err, h)
	}
	h.tokens = tokens
	h.addToken(new, added)
	if err := v.writeArea(v.head.memory, h.meta.Keyslots[added].Area); err != nil {
		return err
	}
	if err := v.writeHeader(h); err != nil {
		return err
	}
	id, _, _ := h.tokenOfEpoch(new.Epoch)
	return v.dropOthers(h, id)
}

// addKey adds a keyslot for new to the header in memory, where the host has no hand, and proves that it opens.
func (v *volume) addKey(ctx context.Context, h *header, slot string, old, new Key) (*header, string, error) {
	// The old keyslot is proven by itself first: luksAddKey would take any.
	if err := testKey(ctx, v.program, v.head, v.device.path, slot, old.Octets()); err != nil {
		return h, "", err
	}
	p := program{path: v.program, header: v.head.memory, key: old.Octets(), key2: new.Octets()}
	args := []string{"luksAddKey", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--new-keyfile-size", fmt.Sprint(len(p.key2))}
	if err := p.run(ctx, keyArgs(args, "", len(p.key), v.device.path, key2Path)...); err != nil {
		return h, "", err
	}
	changed, err := readHeader(v.head.memory)
	if err != nil {
		return h, "", err
	}
	for id := range changed.meta.Keyslots {
		if _, there := h.meta.Keyslots[id]; !there {
			return changed, id, testKey(ctx, v.program, v.head, v.device.path, id, new.Octets())
		}
	}
	return h, "", errors.New("cryptsetup added no keyslot")
}

// Holds says whether what is recorded as opened is open: the mapping is there and of that volume.
func (l *LUKS) Holds() (bool, error) {
	m, err := findMapping(l.Mapper)
	if errors.Is(err, errNoMapping) || l.Recorded == "" {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	d, err := openDevice(l.Device)
	if err != nil {
		return false, err
	}
	defer d.Close()
	if !m.of(l.Recorded, l.Mapper, d.rdev) {
		return false, fmt.Errorf("%w: /dev/mapper/%s is not the volume that this agent opened", ErrTaken, l.Mapper)
	}
	return true, nil
}
