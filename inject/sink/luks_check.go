//go:build linux

package sink

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"keybroker/derive"
)

// HeaderPins are the values that the issuer wants of a volume's header; zero leaves one to the allow list.
type HeaderPins struct {
	Cipher     string // "aes-xts-plain64"
	KeySize    int    // of the volume key, bits
	SectorSize int    // octets
}

// The allow list: what this program formats, and what cryptsetup's defaults and operators' own recovery keyslots look like.
const (
	allowedCipher  = "aes-xts-plain64"
	allowedKeySize = 64 // octets
	afStripes      = 4000

	maxKeyslots   = 8
	maxIterations = 10_000_000 // pbkdf2: seconds, not hours
	maxTime       = 64         // argon2id
	maxMemory     = 1 << 20    // argon2id, KiB: cryptsetup's own most
	maxCPUs       = 4          // argon2id: likewise
	maxSalt       = 64         // octets
)

var (
	allowedHashes      = []string{"sha256", "sha512"}
	allowedSectorSizes = []int{512, 4096}
	// Flags of the mapping that change its speed and nothing that it protects. allow-discards tells the host which blocks
	// are free, so it is not for the disk's header to say.
	allowedFlags = []string{"same-cpu-crypt", "submit-from-crypt-cpus", "no-read-workqueue", "no-write-workqueue"}

	numberPattern = regexp.MustCompile(`^(0|[1-9][0-9]?)$`)
)

// check holds a header to the allow list and to the issuer's pins, for a device of so many octets.
func (h *header) check(pins HeaderPins, deviceSize uint64) error {
	if err := h.checkConfig(deviceSize); err != nil {
		return err
	}
	if err := h.checkSegment(pins, deviceSize); err != nil {
		return err
	}
	if err := h.checkKeyslots(); err != nil {
		return err
	}
	if err := h.checkDigest(); err != nil {
		return err
	}
	return h.checkTokens()
}

func (h *header) checkConfig(deviceSize uint64) error {
	c := h.meta.Config
	switch {
	case c.JSONSize != h.size-binarySize:
		return refuse("json_size is %d, expected %d", c.JSONSize, h.size-binarySize)
	case c.KeyslotsSize%binarySize != 0 || c.KeyslotsSize > MaxMetadata || h.metadataSize() > MaxMetadata:
		return refuse("keyslots_size is %d: the metadata may be %d octets long at most", c.KeyslotsSize, MaxMetadata)
	case h.metadataSize() > deviceSize:
		return refuse("its keyslots go on beyond the device's end")
	}
	for _, f := range c.Flags {
		if !slices.Contains(allowedFlags, f) {
			return refuse("flag %q, expected at most %s", short(f), strings.Join(allowedFlags, ", "))
		}
	}
	for name := range c.Requirements {
		// any, also an empty one: reencryption, and whatever else this program does not know
		return refuse("requirement %q, expected none: a reencryption must be finished by hand first", short(name))
	}
	return nil
}

// checkSegment wants exactly one encrypted segment, from behind the metadata to the device's end.
func (h *header) checkSegment(pins HeaderPins, deviceSize uint64) error {
	s, ok := h.meta.Segments["0"]
	if !ok || len(h.meta.Segments) != 1 {
		return refuse("%d segments, expected one with the number 0", len(h.meta.Segments))
	}
	switch {
	case s.Type != "crypt":
		return refuse("segment 0 is of type %q, expected %q", short(s.Type), "crypt")
	case s.Encryption != allowedCipher:
		return refuse("segment 0 is encrypted with %q, expected %q", short(s.Encryption), allowedCipher)
	case pins.Cipher != "" && s.Encryption != pins.Cipher:
		return refuse("segment 0 is encrypted with %q, the issuer wants %q", short(s.Encryption), short(pins.Cipher))
	case s.Size != "dynamic":
		return refuse("segment 0 has the size %q, expected %q: to the device's end", short(s.Size), "dynamic")
	case !slices.Contains(allowedSectorSizes, s.SectorSize):
		return refuse("segment 0 has sectors of %d octets, expected 512 or 4096", s.SectorSize)
	case pins.SectorSize != 0 && s.SectorSize != pins.SectorSize:
		return refuse("segment 0 has sectors of %d octets, the issuer wants %d", s.SectorSize, pins.SectorSize)
	case pins.KeySize != 0 && pins.KeySize != allowedKeySize*8:
		return refuse("the volume key has %d bits, the issuer wants %d", allowedKeySize*8, pins.KeySize)
	case s.IVTweak != 0:
		return refuse("segment 0 has an iv_tweak of %d, expected 0", s.IVTweak)
	case len(s.Flags) != 0:
		return refuse("segment 0 has flags, expected none")
	case s.Offset < h.metadataSize() || s.Offset%4096 != 0 || s.Offset >= deviceSize:
		return refuse("segment 0 begins at %d, expected behind the metadata and before the device's end", s.Offset)
	}
	return nil
}

func (h *header) checkKeyslots() error {
	if n := len(h.meta.Keyslots); n == 0 || n > maxKeyslots {
		return refuse("%d keyslots, expected 1 to %d", n, maxKeyslots)
	}
	var areas []area
	for id, k := range h.meta.Keyslots {
		if !numberPattern.MatchString(id) {
			return refuse("keyslot %q is not a number", short(id))
		}
		if err := k.check(); err != nil {
			return refuse("keyslot %s: %w", id, err)
		}
		areas = append(areas, k.Area)
	}
	slices.SortFunc(areas, func(a, b area) int {
		if a.Offset < b.Offset {
			return -1
		}
		return 1
	})
	end := 2 * h.size
	for _, a := range areas {
		if a.Offset < end || a.Offset%binarySize != 0 || a.Offset > h.metadataSize() || a.Size > h.metadataSize()-a.Offset {
			return refuse("a keyslot's area at %d is outside the keyslots' area or overlaps another", a.Offset)
		}
		end = a.Offset + a.Size
	}
	return nil
}

func (k *keyslot) check() error {
	switch {
	case k.Type != "luks2":
		return unexpected("type", k.Type, "luks2")
	case k.KeySize != allowedKeySize:
		return unexpected("key size in octets", k.KeySize, allowedKeySize)
	case k.Area.KeySize != allowedKeySize:
		return unexpected("area key size in octets", k.Area.KeySize, allowedKeySize)
	case k.AF.Type != "luks1" || !slices.Contains(allowedHashes, k.AF.Hash):
		return unexpected("anti-forensic splitter", k.AF.Type+" "+k.AF.Hash, "luks1 with sha256 or sha512")
	case k.AF.Stripes != afStripes:
		return unexpected("anti-forensic stripes", k.AF.Stripes, afStripes)
	case k.Area.Type != "raw":
		return unexpected("area", k.Area.Type, "raw")
	case k.Area.Encryption != allowedCipher:
		return unexpected("area encryption", k.Area.Encryption, allowedCipher)
	case k.Area.Size < allowedKeySize*afStripes || k.Area.Size > 1<<20:
		return unexpected("area size", k.Area.Size, "room for the split key, and not over 1 MiB")
	}
	return k.KDF.check()
}

func (k *kdf) check() error {
	if len(k.Salt) == 0 || len(k.Salt) > maxSalt {
		return unexpected("salt size", len(k.Salt), "1 to 64")
	}
	switch k.Type {
	case "pbkdf2":
		switch {
		case !slices.Contains(allowedHashes, k.Hash):
			return unexpected("kdf hash", k.Hash, "sha256 or sha512")
		case k.Iterations < 1000 || k.Iterations > maxIterations:
			return unexpected("kdf iterations", k.Iterations, "1000 to 10000000")
		case k.Time != 0 || k.Memory != 0 || k.CPUs != 0:
			return unexpected("kdf", "pbkdf2 with argon2's parameters", "its own")
		}
		return nil
	case "argon2id":
		switch {
		case k.Time < 1 || k.Time > maxTime:
			return unexpected("kdf time", k.Time, "1 to 64")
		case k.Memory < 32 || k.Memory > maxMemory:
			return unexpected("kdf memory in KiB", k.Memory, "32 to 1048576")
		case k.CPUs < 1 || k.CPUs > maxCPUs:
			return unexpected("kdf cpus", k.CPUs, "1 to 4")
		case k.Hash != "" || k.Iterations != 0:
			return unexpected("kdf", "argon2id with pbkdf2's parameters", "its own")
		}
		return nil
	}
	return unexpected("kdf", k.Type, "pbkdf2 or argon2id")
}

// checkDigest wants one digest that covers the segment and every keyslot: an unbound keyslot holds some other key.
func (h *header) checkDigest() error {
	if len(h.meta.Digests) != 1 {
		return refuse("%d digests, expected one", len(h.meta.Digests))
	}
	id, d := h.digest()
	switch {
	case !numberPattern.MatchString(id):
		return refuse("digest %q is not a number", short(id))
	case d.Type != "pbkdf2" || !slices.Contains(allowedHashes, d.Hash):
		return refuse("digest %s is %q with %q, expected pbkdf2 with sha256 or sha512", id, short(d.Type), short(d.Hash))
	case d.Iterations < 1000 || d.Iterations > maxIterations:
		return refuse("digest %s has %d iterations, expected 1000 to %d", id, d.Iterations, maxIterations)
	case len(d.Salt) == 0 || len(d.Salt) > maxSalt:
		return refuse("digest %s has a salt of %d octets, expected 1 to %d", id, len(d.Salt), maxSalt)
	case len(d.Digest) < 32 || len(d.Digest) > 64:
		return refuse("digest %s is %d octets long, expected 32 to 64", id, len(d.Digest))
	case !slices.Equal(d.Segments, []string{"0"}):
		return refuse("digest %s does not cover segment 0 and nothing else", id)
	case len(d.Keyslots) != len(h.meta.Keyslots):
		return refuse("digest %s covers %d keyslots of %d", id, len(d.Keyslots), len(h.meta.Keyslots))
	}
	return h.knownKeyslots(d.Keyslots)
}

// digest returns the one digest that checkDigest has made sure of.
func (h *header) digest() (string, digest) {
	for id, d := range h.meta.Digests {
		return id, d
	}
	return "", digest{}
}

// checkTokens looks at what is in our own tokens; others did not get past the parser.
func (h *header) checkTokens() error {
	seen := map[uint32]bool{}
	for id, t := range h.tokens {
		switch {
		case !numberPattern.MatchString(id):
			return refuse("token %q is not a number", short(id))
		case derive.CheckKeyName(t.Name) != nil || t.Epoch == 0 || seen[t.Epoch]:
			return refuse("token %s has no valid name, or no epoch of its own", id)
		case len(t.Keyslots) != 1:
			return refuse("token %s is for %d keyslots, expected 1", id, len(t.Keyslots))
		}
		if err := h.knownKeyslots(t.Keyslots); err != nil {
			return err
		}
		seen[t.Epoch] = true
	}
	return nil
}

// knownKeyslots wants ids to be keyslots that exist, each once.
func (h *header) knownKeyslots(ids []string) error {
	seen := map[string]bool{}
	for _, id := range ids {
		if _, ok := h.meta.Keyslots[id]; !ok || seen[id] {
			return refuse("keyslot %q is named that is not there, or twice", short(id))
		}
		seen[id] = true
	}
	return nil
}

// unexpected says what a keyslot has and should have.
func unexpected(what string, got, expected any) error {
	if s, ok := got.(string); ok {
		return fmt.Errorf("%s %q, expected %v", what, short(s), expected)
	}
	return fmt.Errorf("%s %v, expected %v", what, got, expected)
}
