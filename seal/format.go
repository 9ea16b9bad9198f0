package seal

import (
	"bytes"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"keybroker/internal/octet"
)

// Version is that of the realm files that this release reads and writes.
const Version = 1

// Bounds of a realm file, checked before anything is done with it.
const (
	maxFile        = 1 << 20 // octets
	maxParams      = 64 << 10
	maxSlots       = 64
	maxGenerations = 1024
)

// The file as written. Its last member is the checksum, which this struct has not: see Encode.
type wireFile struct {
	Version     uint32           `json:"version"`
	Realm       octet.Hex        `json:"realm"`
	Require     uint32           `json:"require"`
	Generations []wireGeneration `json:"generations"`
	Slots       []wireSlot       `json:"slots"`
	MAC         octet.Hex        `json:"mac,omitzero"`
}

type wireGeneration struct {
	Number  uint32       `json:"number"`
	Check   octet.Hex    `json:"check"`
	Wrapped octet.Base64 `json:"wrapped"`
}

type wireSlot struct {
	ID      octet.Hex      `json:"id"`
	Kind    string         `json:"kind"`
	Created string         `json:"created"`
	Params  jsontext.Value `json:"params"`
	Wrapped octet.Base64   `json:"wrapped"`
}

// The first and last octets of a file of any version: they say the version, and the checksum of all that stands before it.
const (
	head       = "{\n  \"version\": "
	sumPrefix  = ",\n  \"sum\": \""
	sumSuffix  = "\"\n}\n"
	end        = "\n}\n"
	tailLength = len(sumPrefix) + 2*sha256.Size + len(sumSuffix)
)

// A generation is one master of the realm, wrapped.
type generation struct {
	number  uint32
	check   RealmID // the realm id that this master gives
	wrapped []byte
}

// A slot is one way to the share.
type slot struct {
	id      SlotID
	kind    string
	created time.Time // whole seconds, UTC
	params  jsontext.Value
	wrapped []byte
}

// A File is a realm file that was read and is whole: complete, canonical, within bounds. Only opening it shows that it is
// authentic. It is never changed, and safe for concurrent use.
type File struct {
	realm       RealmID
	require     uint32
	generations []generation
	slots       []slot
	mac         []byte
}

// RealmID returns the realm's id as the file says it.
func (f *File) RealmID() RealmID { return f.realm }

// Require returns how many kinds of slots it takes to open the realm: 1 in this release.
func (f *File) Require() int { return int(f.require) }

// Generations returns how many masters the realm has.
func (f *File) Generations() int { return len(f.generations) }

// A Slot is what a realm file says in public of one keyslot.
type Slot struct {
	ID      SlotID
	Kind    string
	Created time.Time      // UTC
	Params  jsontext.Value // the kind's own object
}

// Slots returns all slots, oldest first.
func (f *File) Slots() []Slot {
	out := make([]Slot, len(f.slots))
	for i, s := range f.slots {
		out[i] = Slot{ID: s.id, Kind: s.kind, Created: s.created, Params: s.params.Clone()}
	}
	return out
}

// Encode returns the file's octets. Parse of them gives the same file, and no other octets do.
func (f *File) Encode() ([]byte, error) {
	body, err := f.encodeBody(true)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(sumInput(body))
	out := slices.Concat(body, []byte(sumPrefix+hex.EncodeToString(sum[:])+sumSuffix))
	if len(out) > maxFile {
		return nil, fmt.Errorf("encoding a realm file: %d octets are more than the %d that it may have", len(out), maxFile)
	}
	return out, nil
}

// encodeBody returns the file up to its checksum, or without its mac too.
func (f *File) encodeBody(withMAC bool) ([]byte, error) {
	w := wireFile{Version: Version, Realm: f.realm[:], Require: f.require}
	for _, g := range f.generations {
		w.Generations = append(w.Generations, wireGeneration{Number: g.number, Check: g.check[:], Wrapped: g.wrapped})
	}
	for _, s := range f.slots {
		w.Slots = append(w.Slots, wireSlot{
			ID: s.id[:], Kind: s.kind, Created: s.created.Format(time.RFC3339), Params: s.params, Wrapped: s.wrapped,
		})
	}
	if withMAC {
		w.MAC = f.mac
	}
	out, err := json.Marshal(&w, json.Deterministic(true), jsontext.WithIndent("  "))
	if err != nil {
		return nil, fmt.Errorf("encoding a realm file: %w", err)
	}
	return bytes.TrimSuffix(append(out, '\n'), []byte(end)), nil
}

// Parse reads the octets of a realm file. Its errors are ErrTruncated, ErrCorrupt and ErrNewer, alone or wrapped, and none holds
// anything of the octets.
func Parse(octets []byte) (*File, error) {
	if len(octets) > maxFile {
		return nil, fmt.Errorf("%w (it has more than %d octets)", ErrCorrupt, maxFile)
	}
	sumErr := checkSum(octets)
	if err := checkVersion(octets, sumErr); err != nil {
		return nil, err
	}
	if sumErr != nil {
		return nil, sumErr
	}
	f, err := decode(octets)
	if err != nil {
		return nil, err
	}
	if again, err := f.Encode(); err != nil || !bytes.Equal(again, octets) {
		return nil, fmt.Errorf("%w (it is not in the form that keybroker writes)", ErrCorrupt)
	}
	return f, nil
}

// checkSum holds for files of every version.
func checkSum(octets []byte) error {
	body := len(octets) - tailLength
	if !bytes.HasSuffix(octets, []byte(end)) || body < 0 {
		return ErrTruncated
	}
	sum := sha256.Sum256(sumInput(octets[:body]))
	want := sumPrefix + hex.EncodeToString(sum[:]) + sumSuffix
	if subtle.ConstantTimeCompare(octets[body:], []byte(want)) != 1 {
		return ErrCorrupt
	}
	return nil
}

// checkVersion looks for a higher version at the place where every version has it. When the checksum is wrong too, both are said:
// a later version might compute it in another way.
func checkVersion(octets []byte, sumErr error) error {
	rest, ok := bytes.CutPrefix(octets, []byte(head))
	if !ok {
		return nil
	}
	digits, _, ok := bytes.Cut(rest, []byte(","))
	if !ok || len(digits) > 10 {
		return nil
	}
	version, err := strconv.ParseUint(string(digits), 10, 32)
	switch {
	case err != nil || version <= Version:
		return nil
	case sumErr != nil:
		return fmt.Errorf("%w, by the version that it gives, or: %w", ErrNewer, sumErr)
	}
	return fmt.Errorf("%w: this one reads files up to version %d", ErrNewer, Version)
}

// decode reads a file whose checksum is right.
func decode(octets []byte) (*File, error) {
	var w struct {
		wireFile `json:",inline"`
		Sum      string `json:"sum"`
	}
	if err := json.Unmarshal(octets, &w, json.RejectUnknownMembers(true)); err != nil {
		// The library's error may quote the file.
		return nil, fmt.Errorf("%w (it is not a realm file of version %d)", ErrCorrupt, Version)
	}
	f, err := w.file()
	if errors.Is(err, ErrNewer) {
		return nil, err
	}
	if err != nil {
		return nil, fmt.Errorf("%w (%w)", ErrCorrupt, err)
	}
	return f, nil
}

// file checks every field. Its errors are constant.
func (w *wireFile) file() (*File, error) {
	f := &File{require: w.Require, mac: w.MAC}
	switch {
	case w.Version != Version:
		return nil, errors.New("its version is not one that there ever was")
	case w.Require != 1:
		return nil, fmt.Errorf("%w: this one opens a realm by one slot alone, and this realm requires another number of kinds", ErrNewer)
	case len(w.MAC) != sha256.Size:
		return nil, errors.New("its mac has a wrong length")
	case copy(f.realm[:], w.Realm) != len(f.realm) || len(w.Realm) != len(f.realm):
		return nil, errors.New("its realm id has a wrong length")
	}
	var err error
	if f.generations, err = generations(w.Generations, f.realm); err != nil {
		return nil, err
	}
	if f.slots, err = slots(w.Slots); err != nil {
		return nil, err
	}
	return f, nil
}

func generations(ws []wireGeneration, realm RealmID) ([]generation, error) {
	if len(ws) == 0 || len(ws) > maxGenerations {
		return nil, errors.New("it has no generations, or too many")
	}
	var out []generation
	for i, w := range ws {
		g := generation{number: w.Number, wrapped: w.Wrapped}
		if w.Number != uint32(i+1) || len(w.Check) != len(g.check) || len(w.Wrapped) != wrappedSize {
			return nil, errors.New("a generation is wrong in number or lengths")
		}
		copy(g.check[:], w.Check)
		out = append(out, g)
	}
	if out[0].check != realm {
		return nil, errors.New("its realm id is not that of its first generation")
	}
	return out, nil
}

func slots(ws []wireSlot) ([]slot, error) {
	if len(ws) > maxSlots {
		return nil, errors.New("it has too many slots")
	}
	var out []slot
	seen := make(map[SlotID]bool)
	for _, w := range ws {
		s, err := w.slot()
		if err != nil {
			return nil, err
		}
		if seen[s.id] {
			return nil, errors.New("two slots have one id")
		}
		seen[s.id] = true
		out = append(out, s)
	}
	return out, nil
}

var kindForm = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,31}$`)

func (w *wireSlot) slot() (slot, error) {
	s := slot{kind: w.Kind, wrapped: w.Wrapped}
	if len(w.ID) != len(s.id) || len(w.Wrapped) != wrappedSize || !kindForm.MatchString(w.Kind) {
		return slot{}, errors.New("a slot is wrong in id, kind or lengths")
	}
	copy(s.id[:], w.ID)
	created, err := time.Parse(time.RFC3339, w.Created)
	if err != nil || created.Location() != time.UTC {
		return slot{}, errors.New("a slot has no time of creation in UTC")
	}
	s.created = created
	if s.params, err = canonicalParams(w.Params); err != nil {
		return slot{}, err
	}
	return s, nil
}

// canonicalParams is the compact form of a protector's parameters, as the slot's wrapping authenticates it.
func canonicalParams(params jsontext.Value) (jsontext.Value, error) {
	if params.Kind() != '{' || len(params) > maxParams {
		return nil, errors.New("a slot's parameters are no object, or too long")
	}
	out := params.Clone()
	if err := out.Compact(); err != nil {
		return nil, errors.New("a slot's parameters are no JSON")
	}
	return out, nil
}
