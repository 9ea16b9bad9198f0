//go:build linux

package sink

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"

	"github.com/go-json-experiment/json/jsontext"
)

// What this program formats. The key has at least 256 random bits, so a slow KDF would only delay the boot.
const (
	formatKeyslots = 1 << 20 // octets: four keyslots
	formatOffset   = 16 << 20
	minVolume      = 1 << 20 // octets behind the metadata
	tailChecked    = 1 << 20 // octets at the device's end that must be blank too: GPT, RAID and ZFS leave traces there
)

var formatArgs = []string{
	"--cipher", allowedCipher, "--key-size", strconv.Itoa(allowedKeySize * 8), "--hash", "sha256",
	"--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000",
}

// marker lies in a device's first sector while its header is being written, and says that what follows is nobody's: a format
// that a crash ended is begun anew, and no other device is ever mistaken for one.
var marker = append([]byte("keybroker: this device was blank and is being formatted; not finished\n"), make([]byte, 512-70)...)

// interrupted says whether the device's first sector is the marker.
func interrupted(r io.ReaderAt) bool {
	first := make([]byte, len(marker))
	_, err := r.ReadAt(first, 0)
	return err == nil && slices.Equal(first, marker)
}

// mayFormat says whether there is nothing to lose on the device.
func (v *volume) mayFormat() error {
	if v.device.size < formatOffset+minVolume {
		return fmt.Errorf("formatting %s: it has %d octets, expected at least %d", v.device.path, v.device.size, formatOffset+minVolume)
	}
	if interrupted(v.head) {
		return nil
	}
	blank, err := v.head.blank()
	if err == nil && blank {
		blank, err = zeros(v.device, v.device.size-tailChecked, tailChecked)
	}
	if err != nil {
		return err
	}
	if !blank {
		return fmt.Errorf("%w: %s; if nothing on it is needed, `blkdiscard -z %[2]s` clears it", ErrNotBlank, v.device.path)
	}
	return nil
}

// format makes a new volume: the whole header first, in memory, with cryptsetup; then on the device, so that at no moment there
// is something on it that a later start would take for a foreign or a finished volume.
func (v *volume) format(ctx context.Context, k Key) (*header, error) {
	memory, err := newMemory("luks2 header")
	if err != nil {
		return nil, err
	}
	fresh := &snapshot{memory: memory, from: memory, size: v.device.size, have: 2*minHeaderSize + formatKeyslots}
	v.head.Close()
	v.head = fresh // from here on the header is this one, and not what the host shows
	if err := memory.Truncate(fresh.have); err != nil {
		return nil, fmt.Errorf("making a header in memory: %w", err)
	}
	args := append(slices.Clone(formatArgs), "--luks2-metadata-size", "16k", "--luks2-keyslots-size", "1m", "--offset", strconv.Itoa(formatOffset/512))
	if k.Pins.SectorSize != 0 {
		args = append(args, "--sector-size", strconv.Itoa(k.Pins.SectorSize))
	}
	p := program{path: v.program, header: memory, key: k.Octets()}
	args = keyArgs(append([]string{"luksFormat"}, args...), "", len(p.key), v.device.path)
	if err := p.run(ctx, args...); err != nil {
		return nil, fmt.Errorf("formatting %s: %w", v.device.path, err)
	}
	h, err := readHeader(memory)
	if err != nil {
		return nil, fmt.Errorf("formatting %s: %w", v.device.path, err)
	}
	if err := h.check(k.Pins, uint64(v.device.size)); err != nil {
		return nil, fmt.Errorf("formatting %s: %w", v.device.path, err)
	}
	h.addToken(k, onlyKeyslot(h))
	return h, v.writeVolume(h, memory)
}

// onlyKeyslot is the id of a new volume's keyslot.
func onlyKeyslot(h *header) string {
	for id := range h.meta.Keyslots {
		return id
	}
	return ""
}

// addToken says in the header that the key k opens a keyslot.
func (h *header) addToken(k Key, slot string) {
	h.tokens[h.freeToken()] = token{Type: tokenType, Keyslots: []string{slot}, Name: k.Name, Epoch: k.Epoch, Subject: k.Subject}
	h.sequence++
}

// writeVolume writes a whole new header to the device: the marker, everything behind the first block, the first block; each is
// on the disk before the next.
func (v *volume) writeVolume(h *header, keyslots io.ReaderAt) error {
	f, err := v.device.writer(true)
	if err != nil {
		return err
	}
	defer f.Close()
	first, err := h.copyAt(0)
	if err != nil {
		return err
	}
	second, err := h.copyAt(h.size)
	if err != nil {
		return err
	}
	areas := make([]byte, h.meta.Config.KeyslotsSize)
	if _, err := keyslots.ReadAt(areas, int64(2*h.size)); err != nil {
		return fmt.Errorf("reading the new keyslots: %w", err)
	}
	if err := writeSynced(f, marker, 0); err != nil {
		return err
	}
	if err := writeSynced(f, slices.Concat(first[binarySize:], second, areas), binarySize); err != nil {
		return err
	}
	return writeSynced(f, first[:binarySize], 0)
}

// writeHeader writes a changed header over the one on the device, the second copy first: at every moment one of the two holds.
func (v *volume) writeHeader(h *header) error {
	f, err := v.device.writer(false)
	if err != nil {
		return err
	}
	defer f.Close()
	for _, at := range []uint64{h.size, 0} {
		b, err := h.copyAt(at)
		if err != nil {
			return err
		}
		if err := writeSynced(f, b, int64(at)); err != nil {
			return err
		}
	}
	return nil
}

// writeArea copies one keyslot's area from a file to the device.
func (v *volume) writeArea(from *os.File, a area) error {
	f, err := v.device.writer(false)
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, a.Size)
	if _, err := from.ReadAt(b, int64(a.Offset)); err != nil {
		return fmt.Errorf("reading a keyslot: %w", err)
	}
	return writeSynced(f, b, int64(a.Offset))
}

// dropOthers takes the keyslots of all tokens but one out of the volume, and wipes them.
func (v *volume) dropOthers(h *header, keep string) error {
	var wipe []area
	digestID, d := h.digest()
	for id, t := range h.tokens {
		if id == keep {
			continue
		}
		slot := t.Keyslots[0]
		wipe = append(wipe, h.meta.Keyslots[slot].Area)
		delete(h.meta.Keyslots, slot)
		delete(h.tokens, id)
		d.Keyslots = slices.DeleteFunc(slices.Clone(d.Keyslots), func(s string) bool { return s == slot })
	}
	h.meta.Digests[digestID] = d
	h.meta.Tokens = map[string]jsontext.Value{}
	h.sequence++
	if err := v.writeHeader(h); err != nil {
		return err
	}
	return v.wipeAreas(wipe)
}

func (v *volume) wipeAreas(areas []area) error {
	f, err := v.device.writer(false)
	if err != nil {
		return err
	}
	defer f.Close()
	for _, a := range areas {
		if err := writeSynced(f, make([]byte, a.Size), int64(a.Offset)); err != nil {
			return err
		}
	}
	return nil
}
