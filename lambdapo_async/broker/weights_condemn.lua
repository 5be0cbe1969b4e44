-- Close old versions that nobody reads to new readers; returns version, chunks, version, chunks, ...
-- of everything closed, what an earlier call closed and a crash left included.
-- KEYS[1] = state, KEYS[2] = versions, KEYS[3] = readers
-- ARGV[1] = fence, ARGV[2] = newest versions that stay
local time = redis.call('TIME')
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', time[1] * 1000 + math.floor(time[2] / 1000))
local is_read = {}
for _, member in ipairs(redis.call('ZRANGE', KEYS[3], 0, -1)) do
  is_read[string.match(member, '^(%d+)|')] = true
end
local versions = redis.call('ZRANGE', KEYS[2], 0, -1)
table.sort(versions, function(a, b) return tonumber(a) > tonumber(b) end)
local closed = {'OK'}
for i = tonumber(ARGV[2]) + 1, #versions do
  local version = versions[i]
  if not is_read[version] then
    local chunks = math.abs(tonumber(redis.call('ZSCORE', KEYS[2], version)))
    redis.call('ZADD', KEYS[2], -chunks, version)
    closed[#closed + 1] = version
    closed[#closed + 1] = chunks
  end
end
return closed
